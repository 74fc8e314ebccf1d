#!/bin/sh
# One wheel, built once, with several Pythons and releases of torch: it imports, loads its libraries, and passes the
# operators' tests. Each pair has an environment of its own, of up to 6 GB, which is removed when it has been used.
set -e
FOLDER=${FOLDER:-.wheels}
PAIRS=${PAIRS:-"3.10:2.11.0 3.11:2.13.0 3.12:2.14.1 3.13:2.14.1"}
WHEEL=$(ls dist/memkern-*.whl)
rm -rf "$FOLDER"
mkdir "$FOLDER"
cp -r tests "$FOLDER/tests" # away from the sources: what is imported has to be the wheel
WHEEL=$(realpath "$WHEEL")
for pair in $PAIRS; do
  python=${pair%:*} torch=${pair#*:}
  echo "Python $python, torch $torch"
  "python$python" -m venv "$FOLDER/environment"
  bin=$(realpath "$FOLDER/environment/bin")
  "$bin/python" -m pip install --quiet "torch==$torch" "$WHEEL" pytest hypothesis
  (
    cd "$FOLDER"
    "$bin/memkern" info
    "$bin/python" -m pytest -q -p no:cacheprovider -c /dev/null --rootdir tests -m "not (interpreter or gpu)" \
      tests/test_edit_embeds.py tests/test_edit_kv.py tests/test_embed_tokens.py tests/test_biased_attention.py \
      tests/test_attention_mass.py tests/test_absorbed_attention.py tests/test_backends.py tests/fuzz/test_operators.py
  )
  rm -rf "$FOLDER/environment"
done
