# Every target sets up what it needs: a virtual environment, the pinned packages, the compiled extension.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready
SOURCES = setup.py pyproject.toml $(wildcard csrc/*.cpp csrc/cpu/*.cpp csrc/cpu/*.h)

.PHONY: demo test test-slow bench lint format clean

demo: $(READY)
	$(BIN)/memkern demo

test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(READY)
	$(BIN)/python -m pytest

bench: $(READY)
	mkdir -p .benchmarks
	$(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-json=.benchmarks/latest.json
	$(BIN)/python benchmarks/report.py .benchmarks/latest.json benchmarks/results.md

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(wildcard csrc/*.cpp csrc/cpu/*.cpp csrc/cpu/*.h)

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(wildcard csrc/*.cpp csrc/cpu/*.cpp csrc/cpu/*.h)

clean:
	rm -rf $(VENV) build memkern/*.so memkern/build.json

$(READY): requirements-dev.txt requirements-vocabulary.txt $(SOURCES)
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), "memkern needs Python 3.10 or newer"'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --no-deps -r requirements-vocabulary.txt
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps -e .
	touch $@
