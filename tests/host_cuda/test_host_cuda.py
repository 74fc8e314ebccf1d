"""The CUDA kernels' own bodies on the CPU: against the reference, between guard zones, and that errors show."""

from __future__ import annotations

import os
import shutil

import kernels
import pytest
import torch
from operators import assert_accurate, random_plan

from memkern import Role, ops, token_roles

COMPILER = shutil.which(os.environ.get("CXX", "g++").split()[0])

pytestmark = [pytest.mark.host_cuda, pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")]

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
SHAPES = [(2, 77, 768), (3, 154, 40), (1, 77, 1), (5, 9, 33), (2, 77, 2048), (1, 1, 8)]
SHAPES += [(0, 77, 64), (2, 0, 64), (2, 77, 0)]
WIDTHS_IN_VECTORS = (768, 40, 2048, 8, 64)
EOT = 49


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    return kernels.build(kernels.SOURCES, tmp_path_factory.mktemp("host_cuda"), COMPILER)


def edits(shape, dtype, bank_rows, tensors=1, seed=0):
    """One or two of (rows, bank, scale), and their source."""
    batch, length, width = shape
    torch.manual_seed(seed)
    source, _ = random_plan(batch, length, max(1, length + bank_rows), seed)
    found = []
    for index in range(tensors):
        rows = torch.randn(shape).to(dtype)
        bank = torch.randn(batch, bank_rows, width).to(dtype) if bank_rows else None
        found.append((rows, bank, random_plan(batch, length, 1, seed + index)[1]))
    return found, source


def check_edit(library, made, source, **options):
    """The kernel against the reference at the same dtype and in float64; true if it moved 16 bytes at a time."""
    outputs, vectors = kernels.edit(library, made, source, **options)
    for out, (rows, bank, scale) in zip(outputs, made, strict=True):
        exact = ops.edit_embeds(rows.double(), None if bank is None else bank.double(), source, scale, backend="torch")
        assert_accurate(out, ops.edit_embeds(rows, bank, source, scale, backend="torch"), exact)
    return vectors


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bank_rows", [0, 2])
@pytest.mark.parametrize("tensors", [1, 2])
def test_edit(library, dtype, shape, bank_rows, tensors):
    vectors = check_edit(library, *edits(shape, dtype, bank_rows, tensors))
    assert vectors == (shape[2] in WIDTHS_IN_VECTORS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_do_not_start_at_16_bytes(library, dtype):
    made, source = edits((2, 9, 64), dtype, 2)
    assert not check_edit(library, made, source, shift=dtype.itemsize)


@pytest.mark.parametrize("layout", ["padded", "transposed"])
def test_strided_rows(library, layout):
    made, source = edits((3, 9, 64), torch.float16, 2)
    moved = []
    for rows, bank, scale in made:
        views = [
            torch.cat([tensor, tensor], -1)[..., : tensor.shape[-1]]
            if layout == "padded"
            else tensor.transpose(0, 1).contiguous().transpose(0, 1)
            for tensor in (rows, bank)
        ]
        moved.append((*views, scale))
    assert check_edit(library, moved, source)


def test_few_blocks_stride_over_many_rows(library):
    made, source = edits((4, 77, 40), torch.float32, 0, tensors=2)
    check_edit(library, made, source, blocks=3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [33, 64])
def test_zero_selects_one_copies_and_a_bad_source_is_nan(library, dtype, width):
    ((rows, bank, _),), source = edits((2, 9, width), dtype, 2)
    scale = torch.ones(2, 9)
    source[0, :6] = torch.tensor([3, 4, 10, 11, -1, 2**31 - 1])
    scale[0, :2], scale[0, 4] = 0, 0
    rows[0, 3], rows[0, 4] = float("nan"), float("inf")
    (out,), _ = kernels.edit(library, [(rows, bank, scale)], source)
    assert torch.equal(out[0, :2], torch.zeros(2, width, dtype=dtype))
    assert torch.equal(out[0, 2], bank[0, 1])
    assert out[0, 3:6].isnan().all()
    everything = torch.cat([rows, bank], 1)
    copied = everything[1, source[1].long()]
    assert torch.equal(out[1].view(torch.uint8), copied.view(torch.uint8))


def tokens(batch, length, width, dtype):
    torch.manual_seed(4)
    ids = torch.randint(1, EOT, (batch, length))
    ids[:, length // 3 :] = EOT
    return ids, token_roles(ids, eos_token_id=EOT), torch.randn(50, width).to(dtype), torch.randn(80, width).to(dtype)


def check_embed(library, ids, roles, token_weight, position_weight, **options):
    out, vectors = kernels.embed(library, ids, roles, token_weight, position_weight, 7, **options)
    exact = ops.embed_tokens(ids, roles, token_weight.double(), position_weight.double(), 7, backend="torch")
    assert_accurate(out, ops.embed_tokens(ids, roles, token_weight, position_weight, 7, backend="torch"), exact)
    return vectors


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 8, 33, 768])
@pytest.mark.parametrize("blocks", [0, 2])
def test_embed(library, dtype, width, blocks):
    vectors = check_embed(library, *tokens(3, 77, width, dtype), blocks=blocks)
    assert vectors == (width in (8, 768))


def test_embed_strided_and_unaligned_weights(library):
    ids, roles, token_weight, position_weight = tokens(2, 77, 64, torch.float16)
    padded = torch.cat([token_weight, token_weight], -1)[:, :64]
    assert check_embed(library, ids, roles, padded, position_weight)
    assert not check_embed(library, ids, roles, padded, position_weight, shift=2)


@pytest.mark.parametrize("bad", [-1, 50, 2**40])
def test_embed_answers_a_bad_id_with_nan(library, bad):
    ids, roles, token_weight, position_weight = tokens(2, 77, 64, torch.float32)
    ids[0, 1], ids[1, 76] = bad, bad
    # More rows lie behind the vocabulary: what is read there is not NaN by itself.
    vocabulary = torch.cat([token_weight, token_weight])[: len(token_weight)]
    out, _ = kernels.embed(library, ids, roles, vocabulary, position_weight, 7)
    assert roles[1, 76] == Role.PAD
    assert out[0, 1].isnan().all()
    out[0, 1] = 0
    assert out.isfinite().all()


MUTATIONS = {
    "a row too far": ("edit_rows.cuh", "edit.rows.at(batch, source)", "edit.rows.at(batch, source + 1)"),
    "a column too far": ("edit_rows.cuh", "(row + column)", "(row + column + kSize)"),
    "the bank from its end": ("edit_rows.cuh", "source - plan.length)", "source)"),
    "a row written too far": ("edit_rows.cuh", "edit.out + i * plan.width", "edit.out + (i + 1) * plan.width"),
    "one row too many": ("edit_rows.cuh", "i < plan.count", "i <= plan.count"),
    "one column too many": ("edit_rows.cuh", "column < plan.width", "column < plan.width + kSize"),
    "a source unchecked": ("edit_rows.cuh", "source < plan.length + plan", "source <= plan.length + plan"),
    "a source below 0": ("edit_rows.cuh", "source >= 0 &&", "source >= -1 &&"),
    "a product with 0": ("edit_rows.cuh", "valid && scale != 0.0f", "valid"),
    "V left out": ("edit_rows.cuh", "first : second", "first : first"),
    "a stride that skips": ("edit_rows.cuh", "i += rows_at_once", "i += rows_at_once + 1"),
    "the neighbour's batch": ("edit_rows.cuh", "i / plan.length", "(i + 1) / plan.length"),
    "another position": ("embed_tokens.cuh", "i % embed.length", "(i + 1) % embed.length"),
    "another token": ("embed_tokens.cuh", "(valid ? id : 0)", "(valid ? id + 1 : 0)"),
    "an id unchecked": ("embed_tokens.cuh", "id < embed.vocabulary", "id <= embed.vocabulary"),
    "one embedding too many": ("embed_tokens.cuh", "i < embed.count", "i <= embed.count"),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_wrong_index_shows(tmp_path, mutation):
    """These checks can fail: each shifted index fails one of them."""
    name, right, wrong = MUTATIONS[mutation]
    sources = tmp_path / "csrc"
    shutil.copytree(kernels.SOURCES, sources)
    text = (sources / "cuda" / name).read_text()
    assert text.count(right) == 1
    (sources / "cuda" / name).write_text(text.replace(right, wrong))
    mutant = kernels.build(sources, tmp_path, COMPILER)
    with pytest.raises(AssertionError):
        check_everything(mutant)


def test_a_right_index_does_not(library):
    check_everything(library)


def check_everything(library):
    check_edit(library, *edits((2, 77, 64), torch.float32, 2, tensors=2), blocks=3)
    check_embed(library, *tokens(3, 77, 64, torch.float32), blocks=2)
    test_zero_selects_one_copies_and_a_bad_source_is_nan(library, torch.float32, 64)
    test_embed_answers_a_bad_id_with_nan(library, 50)
