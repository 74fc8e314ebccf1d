#!/bin/sh
# The pipelines' tests with the oldest versions that are supported, in an environment of its own; the newest are those
# of requirements-dev.txt, which `make test` runs with.
set -e
PYTHON=${PYTHON:-python3}
FOLDER=${FOLDER:-.matrix}
OLDEST="diffusers==${DIFFUSERS:-0.34.0} transformers==${TRANSFORMERS:-4.57.3}"

test -x "$FOLDER/bin/python" || "$PYTHON" -m venv "$FOLDER"
grep -vE "^(diffusers|transformers|tokenizers|triton|ruff|mypy|clang-format|compel)[=]" requirements-dev.txt > "$FOLDER/pinned.txt"
# shellcheck disable=SC2086
"$FOLDER/bin/python" -m pip install --quiet -r "$FOLDER/pinned.txt" $OLDEST pyparsing
"$FOLDER/bin/python" -m pip install --quiet --no-deps compel==2.5.1 -r requirements-vocabulary.txt
"$FOLDER/bin/python" -m pip install --quiet --no-build-isolation --no-deps -e .
"$FOLDER/bin/python" -m pip list 2>/dev/null | grep -E "^(diffusers|transformers|torch) "
"$FOLDER/bin/python" -m pytest tests/pipelines tests/audit -m "not slow"
