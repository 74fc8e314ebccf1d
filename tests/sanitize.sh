#!/bin/sh
# The CPU library built with ASan and UBSan, in a copy of the tree, and the operators' tests with it.
set -e
BIN=${BIN:-.venv/bin}
FOLDER=${FOLDER:-.sanitize}
rm -rf "$FOLDER"
mkdir "$FOLDER"
cp -r memkern csrc tests setup.py pyproject.toml README.md MANIFEST.in LICENSE "$FOLDER"
cd "$FOLDER"
rm -f memkern/*.so
FLAGS="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1"
CFLAGS="$FLAGS" CXXFLAGS="$FLAGS" LDFLAGS="-fsanitize=address,undefined" MEMKERN_BUILD=cpp \
  "$BIN/python" setup.py -q build_ext --inplace
nm -D memkern/_C.abi3.so | grep -q __asan || { echo "the library is not instrumented"; exit 1; }
# Python itself is not instrumented: the runtime has to come first, and leaks of the interpreter are not ours.
LD_PRELOAD="$(${CXX:-g++} -print-file-name=libasan.so) $(${CXX:-g++} -print-file-name=libubsan.so)" \
ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH="$PWD" MEMKERN_EXAMPLES="${EXAMPLES:-200}" \
"$BIN/python" -m pytest -p no:cacheprovider tests/test_edit_embeds.py tests/test_edit_kv.py tests/test_embed_tokens.py \
  tests/test_biased_attention.py tests/test_attention_mass.py tests/test_absorbed_attention.py \
  tests/fuzz/test_operators.py \
  -m "not (slow or interpreter or aot or host_cuda or gpu)"
