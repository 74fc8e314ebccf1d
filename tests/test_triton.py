"""Triton's launches: widths in parts, the table of configurations, and both forms of absorbed attention."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: no kernels")

from operators import assert_accurate
from test_absorbed_attention import by_hand, exactly, sample

from memkern import ops
from memkern.ops import backends
from memkern.ops.triton import absorbed_attention as absorbed
from memkern.ops.triton.configs import Card, family_of, table
from memkern.ops.triton.launch import power_of_2, split_width
from memkern.ops.triton.layers import LAYERS, attention_launches

interpreter = pytest.mark.interpreter
needs_interpreter = pytest.mark.skipif(not backends.INTERPRETING, reason="needs a process with TRITON_INTERPRET=1")


@pytest.mark.parametrize("size", [1, 8, 16, 33, 40, 64, 77, 80, 160, 231, 256, 320, 640, 1280])
@pytest.mark.parametrize("largest", [32, 64, 256])
def test_parts_cover_a_width_up_to_the_next_multiple_of_16(size, largest):
    parts = split_width(size, largest)
    assert sum(parts) == 16 * math.ceil(size / 16)
    assert all(part == power_of_2(part) and 16 <= part <= largest for part in parts)


def test_head_dims_of_sd_waste_nothing_that_can_be_avoided():
    assert [split_width(width) for width in (40, 64, 80, 160)] == [(32, 16), (64,), (64, 16), (128, 32)]


@pytest.mark.parametrize(
    ("capability", "family"),
    [((7, 5), 75), ((8, 0), 80), ((8, 7), 86), ((8, 9), 89), ((9, 0), 90), ((10, 3), 100), ((12, 1), 120)],
)
def test_families(capability, family):
    assert family_of(capability) == f"sm{family}"


def test_a_card_that_is_newer_or_older_than_the_table_takes_the_nearest():
    assert family_of((13, 0)) == "sm120"
    assert family_of((7, 0)) == "sm75"


@pytest.mark.parametrize("family", list(table()))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_the_table_serves_every_layer(family, dtype):
    for processors in (1, 1 << 30):
        for layer in LAYERS:
            launches = attention_launches(layer, 77, dtype, Card(processors, table()[family]))
            assert all(math.prod(launch.grid) > 0 for launch in launches)


def test_a_table_of_ones_own_comes_first(tmp_path):
    own = tmp_path / "configs.json"
    entry = {"bits": 16, "width": None, "BLOCK_ROWS": 4, "BLOCK_COLUMNS": 256, "num_warps": 2, "num_stages": 1}
    own.write_text(json.dumps({"sm80": {"edit_rows": [entry]}}))
    code = (
        "import torch; from memkern.ops.triton.configs import Card, table;"
        "print(Card(1, table()['sm80']).config('edit_rows', 768, torch.float16), 'biased_attention' in table()['sm90'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"MEMKERN_CONFIGS": str(own)}, check=True
    )
    assert "'BLOCK_ROWS': 4" in done.stdout
    assert done.stdout.strip().endswith("True")


def test_what_the_table_has_not_is_refused():
    card = Card(1, table()["sm80"])
    with pytest.raises(
        NotImplementedError, match="biased_attention: no configuration for torch.float16 and a width of"
    ):
        card.config("biased_attention", 257, torch.float16)
    with pytest.raises(NotImplementedError, match="absorbed_attention: no configuration for torch.float32"):
        card.config("absorbed_attention", 320, torch.float32)


def forms(width, dtype, processors):
    """The kernels that a card of so many processors would run for one sequence of 33 rows."""
    x, a, bias, vo, *extras = sample(1, 33, width, 2, 7, dtype)
    launches = absorbed.plan(x, a, bias, vo, *extras, torch.empty_like(x), Card(processors, table()["sm80"]))
    return [launch.kernel.__name__ for launch in launches]


def test_one_kernel_where_it_fits_and_fills_the_card():
    two = ["absorbed_probabilities_kernel", "absorbed_values_kernel"]
    assert forms(320, torch.float16, 2) == ["absorbed_attention_kernel"]
    assert forms(320, torch.float16, 3) == two
    assert forms(640, torch.float16, 1) == two
    assert forms(320, torch.float32, 1) == two


def test_many_keys_are_refused():
    x, a, bias, vo, *extras = sample(1, 2, 8, 1, 257)
    with pytest.raises(NotImplementedError, match="absorbed_attention: 257 keys, more than 256"):
        absorbed.plan(x, a, bias, vo, *extras, x, Card(1, table()["sm80"]))


@interpreter
@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("processors", [1, 1 << 30], ids=["one kernel", "two kernels"])
@pytest.mark.parametrize(
    "shape", [(2, 33, 40, 2, 77), (1, 65, 320, 2, 33), (2, 7, 33, 3, 16), (2, 9, 24, 1, 231)], ids=str
)
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("extras", [False, True])
def test_both_forms_of_absorbed_attention(dtype, processors, shape, per_head, extras):
    """Rows of one batch take the narrow and the wide body: the first has a third of the keys."""
    arguments = sample(*shape, dtype, per_head, extras)
    entry = {"bits": 32, "width": None, "BLOCK_M": 16, "BLOCK_C": 32, "PART_C": 64, "num_warps": 4, "num_stages": 1}
    entries = table()["sm80"]
    card = Card(processors, entries | {"absorbed_attention": [*entries["absorbed_attention"], entry]})
    out = torch.full_like(arguments[0], float("nan"))
    launches = absorbed.plan(*arguments, out, card)
    assert len(launches) == (1 if processors == 1 else 2)
    for launch in launches:
        launch.run()
    assert_accurate(out, by_hand(*arguments), exactly(*arguments))


@interpreter
@needs_interpreter
def test_the_interpreter_is_refused_bfloat16():
    rows = torch.randn(1, 3, 4).bfloat16()
    with pytest.raises(ValueError, match="triton's interpreter computes bfloat16 wrongly"):
        ops.edit_embeds(rows, None, torch.zeros(1, 3, dtype=torch.int32), torch.ones(1, 3), backend="triton")
