#!/bin/sh
# Which lines of memkern's Python and of the CPU's C++ the tests run: the plain and the interpreter's layer, in a copy of
# the tree whose library is built for it; processes that tests start are counted.
set -e
BIN=${BIN:-.venv/bin}
FOLDER=${FOLDER:-.coverage-run}
JOBS=${JOBS:-1}
rm -rf "$FOLDER"
mkdir "$FOLDER"
cp -r memkern csrc tests benchmarks docs examples setup.py pyproject.toml mkdocs.yml Makefile requirements-*.txt ./*.md \
  MANIFEST.in LICENSE "$FOLDER"
cd "$FOLDER"
rm -f memkern/*.so
CFLAGS="--coverage" CXXFLAGS="--coverage" LDFLAGS="--coverage" MEMKERN_BUILD=cpp \
  "$BIN/python" setup.py -q build_ext --inplace
export PYTHONPATH="$PWD"
cat > coverage.ini <<'END'
[run]
source = memkern
parallel = true
patch = subprocess
[report]
skip_covered = true
show_missing = true
exclude_also = @triton.jit
  if TYPE_CHECKING:
END
export COVERAGE_RCFILE="$PWD/coverage.ini" COVERAGE_FILE="$PWD/.coverage"
covered() { "$BIN/python" -m coverage run -m pytest -n "$JOBS" -p no:cacheprovider "$@"; }
covered -m "not (slow or interpreter or aot or host_cuda or gpu)" --deselect tests/test_package.py
TRITON_INTERPRET=1 covered -m "interpreter and not slow"
"$BIN/python" -m coverage combine --quiet
"$BIN/python" -m coverage report
"$BIN/gcovr" --root . --filter csrc/ --exclude-throw-branches --gcov-ignore-parse-errors=negative_hits.warn
