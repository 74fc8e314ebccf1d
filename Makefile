# Every target sets up what it needs: a virtual environment, the pinned packages, the compiled extension.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready
# Processes beside each other: most tests are of one thread.
JOBS ?= $(shell nproc 2>/dev/null || echo 1)
PYTEST = $(BIN)/python -m pytest -n $(JOBS) --dist worksteal
CXX_FILES = $(shell find csrc tests/host_cuda -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
SOURCES = setup.py pyproject.toml $(filter csrc/%,$(CXX_FILES))
# What `make test` leaves to processes of their own.
LAYERS = interpreter or aot

.PHONY: demo serve test test-slow test-plain test-layers test-matrix test-wheel test-install fuzz sanitize coverage gpu \
  bench docs wheel lint format clean

demo: $(READY)
	$(BIN)/memkern demo

# The example of a server, on the embedded model: http://127.0.0.1:8000.
serve: $(READY)
	$(BIN)/python -m examples.server

SPEED = not slow
test-slow: SPEED = slow or not slow
test test-slow: test-plain test-layers

test-plain: lint
	$(PYTEST) -m "($(SPEED)) and not ($(LAYERS))"

# Triton's kernels without a GPU: interpreted, and compiled ahead of time. Tests that need a card count as skipped before.
test-layers: test-plain
	@echo "layer: interpreter"
	TRITON_INTERPRET=1 $(PYTEST) -m "($(SPEED)) and interpreter"
	@echo "layer: aot"
	$(PYTEST) -n 0 -m "($(SPEED)) and aot"

# Operators, plans and pipelines on drawn input: rounds of so many examples until the minutes have passed, at least one.
# What failed is kept in .hypothesis and tried first.
EXAMPLES ?= 2000
MINUTES ?= 0
fuzz: $(READY)
	end=$$(($$(date +%s) + 60 * $(MINUTES))); \
	until MEMKERN_EXAMPLES=$(EXAMPLES) $(PYTEST) tests/fuzz || exit 1; [ $$(date +%s) -ge $$end ]; do :; done

# The C++ of the CPU under the address and undefined-behaviour sanitizers, by the operators' tests.
sanitize: $(READY)
	BIN=$(abspath $(BIN)) tests/sanitize.sh

# The oldest versions of diffusers and transformers that are supported.
test-matrix:
	PYTHON=$(PYTHON) tests/matrix.sh

# The wheel with every supported Python, and with several releases of torch (gigabytes are downloaded).
test-wheel: wheel
	tests/wheels.sh

# Installing with and without isolation, a compiler and nvcc.
test-install:
	PYTHON=$(PYTHON) tests/install.sh

# Which lines the tests run, of Python and of the CPU's C++.
coverage: $(READY)
	BIN=$(abspath $(BIN)) JOBS=$(JOBS) tests/coverage.sh

# The documentation, to read from a folder: build/site/index.html.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# On a machine with an NVIDIA GPU: tests, benchmarks and their table.
gpu: $(READY)
	$(BIN)/python benchmarks/gpu.py

bench: $(READY)
	mkdir -p .benchmarks
	$(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-json=.benchmarks/latest.json
	$(BIN)/python benchmarks/report.py .benchmarks/latest.json benchmarks/results.md

# An sdist, and a wheel of the stable ABIs of Python and torch: one for Python 3.10 and later, torch 2.11 and later.
wheel: $(READY)
	rm -rf dist
	$(BIN)/python setup.py -q sdist --dist-dir dist
	$(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .

# torch's headers are another's code: their warnings are not shown.
HEADERS = $(shell $(BIN)/python -c "import sysconfig; from torch.utils.cpp_extension import include_paths; \
  print(*('-isystem ' + path for path in [*include_paths(), sysconfig.get_paths()['include']]))")
lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	$(BIN)/mypy & types=$$!; \
	printf '%s\n' $(wildcard csrc/*.cpp csrc/*/*.cpp) | xargs -P $(JOBS) -I FILE $(BIN)/clang-tidy --quiet FILE -- \
	  -std=c++17 -DUSE_CUDA -DTORCH_TARGET_VERSION=0x020b000000000000 $(HEADERS) 2> /dev/null; \
	tidy=$$?; wait $$types && exit $$tidy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

clean:
	rm -rf $(VENV) build dist memkern/*.so memkern/build.json

$(READY): requirements-dev.txt requirements-vocabulary.txt requirements-quantized.txt $(SOURCES)
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), "memkern needs Python 3.10 or newer"'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --no-deps -r requirements-vocabulary.txt
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/quantized -r requirements-quantized.txt
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps -e .
	touch $@
