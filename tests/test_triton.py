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
from memkern.ops.triton import attention_mass as mass
from memkern.ops.triton import biased_attention as biased
from memkern.ops.triton import resident
from memkern.ops.triton.absorbing import tiles
from memkern.ops.triton.configs import Card, family_of, table
from memkern.ops.triton.layers import LAYERS, attention_launches
from memkern.ops.triton.resident import holds
from memkern.ops.triton.sizes import power_of_2, split_width

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
    ("architecture", "family"),
    [
        ("sm_75", "sm75"),
        ("sm_80", "sm80"),
        ("sm_87", "sm86"),
        ("sm_89", "sm89"),
        ("sm_90", "sm90"),
        ("sm_103", "sm100"),
        ("sm_121", "sm120"),
        ("gfx90a", "gfx90a"),
        ("gfx942", "gfx942"),
        ("gfx941", "gfx942"),
        ("gfx1102", "gfx1100"),
        ("gfx1200", "gfx1201"),
    ],
)
def test_families(architecture, family):
    assert family_of(architecture) == family


def test_a_card_that_is_newer_or_older_than_the_table_takes_the_nearest():
    assert family_of("sm_130") == "sm120"
    assert family_of("sm_70") == "sm75"


def test_an_architecture_of_amds_that_is_like_none_of_the_table_is_refused():
    with pytest.raises(NotImplementedError, match="triton: no configurations for gfx1030"):
        family_of("gfx1030")


@pytest.mark.parametrize("family", list(table()))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_the_table_serves_every_layer(family, dtype):
    """Except one on RDNA: float32 queries of 160 channels do not fit into its registers."""
    for layer in LAYERS:
        if family.startswith("gfx1") and dtype == torch.float32 and layer.head_dim == 160:
            with pytest.raises(NotImplementedError, match="biased_attention: no configuration for torch.float32"):
                attention_launches(layer, 77, dtype, Card.typical(family))
        else:
            launches = attention_launches(layer, 77, dtype, Card.typical(family))
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
    with pytest.raises(NotImplementedError, match="resident: no configuration for torch.float32"):
        card.config("resident", 40, torch.float32)


def tile_of(queries, batch, processors, heads=8, keys=80):
    """Rows and columns of the second kernel's tiles."""
    _, (config, _) = tiles(Card.like("sm80", processors), batch, queries, 320, heads, keys, torch.float16)
    return config.constants["BLOCK_M"], config.constants["BLOCK_C"]


def test_tiles_are_chosen_to_fill_the_card():
    """Few rows take small tiles, many rows tall ones that read vo fewer times."""
    assert math.prod(tile_of(64, 2, 108)) < math.prod(tile_of(4096, 8, 108))


def test_heads_that_are_taken_together_divide_all_heads():
    for heads in (1, 5, 8, 10, 20):
        (config, work), _ = tiles(Card.typical("sm80"), 2, 1024, 640, heads, 40, torch.float16)
        assert heads % config.constants["HEADS"] == 0
        assert work.programs == 2 * 1024 // config.constants["BLOCK_M"] * heads // config.constants["HEADS"]


def test_all_keys_are_at_hand_where_they_fit():
    card = Card.typical("sm80")
    assert holds(card, 77, 160, torch.float16)
    assert not holds(card, 154, 64, torch.float16)
    assert not holds(card, 77, 64, torch.float32)
    assert not holds(card, 77, 256, torch.float16)


def test_many_keys_are_refused():
    x, a, bias, vo, *extras = sample(1, 2, 8, 1, 257)
    with pytest.raises(NotImplementedError, match="absorbed_attention: 257 keys, more than 256"):
        absorbed.plan(x, a, bias, vo, *extras, x, Card(1, table()["sm80"]))


def interpreted(kernel, **tile):
    """The interpreter's card with one tile for a kernel, of both element sizes."""
    entries = [{"bits": bits, "width": None, "num_warps": 4, "num_stages": 1, **tile} for bits in (16, 32)]
    return Card(1, table()["sm80"] | {kernel: entries})


@interpreter
@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("several", [1, 2])
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize(
    "shape", [(2, 17, 40, 2, 77), (2, 7, 33, 4, 16), (1, 9, 24, 2, 231), (2, 5, 48, 2, 9)], ids=str
)
def test_absorbed_attention_with_heads_taken_together(dtype, several, shape, per_head):
    """Rows of one batch take the narrow and the wide body: the first has a third of the keys."""
    arguments = sample(*shape, dtype, per_head)
    card = interpreted("absorbed_probabilities", BLOCK_M=16, BLOCK_C=32, HEADS=several)
    out = torch.full_like(arguments[0], float("nan"))
    for launch in absorbed.plan(*arguments, out, card):
        launch.run()
    assert_accurate(out, by_hand(*arguments), exactly(*arguments))


@interpreter
@needs_interpreter
@pytest.mark.parametrize("zeroed", [False, True])
def test_absorbed_attention_of_rows_without_keys_and_of_garbage_behind_excluded_ones(zeroed):
    """The promise is about vo alone: what an excluded key has in a is not used in either case."""
    x, a, bias, vo, out_bias, residual = sample(3, 9, 24, 2, 20)
    bias[1] = -math.inf
    excluded = (bias == -math.inf)[:, None, :, None].expand_as(a)
    expected = exactly(x, a, bias, vo, out_bias, residual)
    a, vo = a.masked_fill(excluded, math.nan), vo.masked_fill(excluded, 0 if zeroed else math.nan)
    out = torch.full_like(x, float("nan"))
    for launch in absorbed.plan(x, a, bias, vo, out_bias, residual, out, Card.like("sm80", 1), zeroed):
        launch.run()
    torch.testing.assert_close(out, expected.float())


@interpreter
@needs_interpreter
@pytest.mark.parametrize(("width", "keys"), [(5, 1), (40, 77), (64, 33), (80, 128), (160, 40)])
@pytest.mark.parametrize("tiles_each", [1, 2])
@pytest.mark.parametrize("views", [False, True])
def test_attention_with_all_keys_at_hand(width, keys, tiles_each, views, monkeypatch):
    """float16, on tensors of their own and on views of projections, with excluded keys and a row without any."""
    torch.manual_seed(4)
    heads, queries = 2, 35
    shapes = [(3, length, heads, width) for length in (queries, keys, keys)]
    q, k, v = (torch.randn(shape).half().transpose(1, 2) for shape in shapes)
    if not views:
        q, k, v = (tensor.contiguous() for tensor in (q, k, v))
    bias = torch.randn(3, keys)
    bias[0, keys // 2 :], bias[1] = -math.inf, -math.inf
    card = Card(1, {"resident": [{"bits": 16, "width": None, "BLOCK_M": 16, "num_warps": 1, "num_stages": 2}]})
    monkeypatch.setattr(resident, "TILES", (tiles_each,))
    monkeypatch.setattr(resident, "MOST_KEY_VALUES", 1 << 30)
    out = torch.full((3, queries, heads, width), float("nan")).half()
    launch = biased.plan(q, k, v, bias, width**-0.5, out, card)
    assert launch.kernel.__name__ == "resident_attention_kernel"
    assert launch.grid == (3 * heads * -(-queries // (16 * tiles_each)),)
    launch.run()
    given = q, k, v, bias, width**-0.5
    low, high = (ops.biased_attention(*(one.to(kind) if isinstance(one, torch.Tensor) and one is not bias else one
                 for one in given), backend="torch") for kind in (torch.float16, torch.float64))  # fmt: skip
    assert_accurate(out.transpose(1, 2), low, high)

    weight, by_query = torch.rand(3, keys), torch.full((3, heads, queries), float("nan"))
    launch, sums = mass.plan(q, k, bias, weight, width**-0.5, by_query, card)
    assert launch.kernel.__name__ == "resident_mass_kernel"
    sums.fill_(float("nan"))
    launch.run()
    by_key, chosen = ops.attention_mass(q.double(), k.double(), bias, weight, width**-0.5, backend="torch")
    torch.testing.assert_close(sums.sum(2) / queries, by_key.float(), atol=2e-6, rtol=1e-4)
    torch.testing.assert_close(by_query, chosen.float(), atol=2e-6, rtol=1e-4)


@interpreter
@needs_interpreter
def test_the_interpreter_is_refused_bfloat16():
    rows = torch.randn(1, 3, 4).bfloat16()
    with pytest.raises(ValueError, match="triton's interpreter computes bfloat16 wrongly"):
        ops.edit_embeds(rows, None, torch.zeros(1, 3, dtype=torch.int32), torch.ones(1, 3), backend="triton")
