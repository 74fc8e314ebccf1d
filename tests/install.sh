#!/bin/sh
# Installing from the sources the ways that people do, each in an environment of its own: what is built, and that it runs.
set -e
PYTHON=${PYTHON:-python3}
FOLDER=${FOLDER:-.install}
TORCH=${TORCH:-$(grep ^torch== requirements-dev.txt)}
rm -rf "$FOLDER"
mkdir "$FOLDER"
FOLDER=$(realpath "$FOLDER")
export TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-8.0}" MEMKERN_BUILD=auto

tools() { # a PATH of the named tools and of what every system has
  rm -rf "$FOLDER/tools"
  mkdir "$FOLDER/tools"
  for tool in sh ld as "$@"; do
    found=$(command -v "$tool") && ln -s "$found" "$FOLDER/tools/$tool"
  done
}

check() { # what `memkern info` has to say, and an operator that has to be right
  "$BIN/memkern" info | tee "$FOLDER/info"
  grep -q "$1" "$FOLDER/info" || { echo "expected: $1"; exit 1; }
  (cd "$FOLDER" && "$BIN/python" -c "
import torch, memkern
q, k = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 7, 8)
out = memkern.ops.biased_attention(q, k, k, torch.zeros(1, 7))
torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, k, k))")
}

begin() { echo; echo "== $1"; }

BIN="$FOLDER/environment/bin"
"$PYTHON" -m venv "$FOLDER/environment"
begin "isolated: no torch to build against, pure Python"
"$BIN/python" -m pip install --quiet --no-deps .
"$BIN/python" -m pip install --quiet "$TORCH" diffusers transformers platformdirs setuptools
check "without the compiled CPU library: torch was not importable at build time"

begin "not isolated, no compiler"
tools
PATH="$FOLDER/tools" "$BIN/python" -m pip install --quiet --force-reinstall --no-deps --no-build-isolation .
check "without the compiled CPU library: no C++ compiler on PATH at build time"

begin "not isolated, a compiler, no nvcc"
tools c++ g++ gcc cc
PATH="$FOLDER/tools" "$BIN/python" -m pip install --quiet --force-reinstall --no-deps --no-build-isolation .
check "with the compiled CPU library; without the CUDA library: no nvcc"

if command -v nvcc > /dev/null; then
  begin "not isolated, all that is here, one job"
  MAX_JOBS=1 "$BIN/python" -m pip install --quiet --force-reinstall --no-deps --no-build-isolation .
  check "with the compiled CPU library; with the CUDA library (nvcc .*: sm_80)"
fi

begin "from the source distribution"
"$BIN/python" setup.py -q sdist --dist-dir "$FOLDER/dist"
MEMKERN_BUILD=cpp "$BIN/python" -m pip install --quiet --force-reinstall --no-deps --no-build-isolation "$FOLDER"/dist/*.tar.gz
check "with the compiled CPU library; without the CUDA library: MEMKERN_BUILD=cpp"
