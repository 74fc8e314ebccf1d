"""embed_tokens: pad swap, token gather and position add, as CLIPTextEmbeddings computes it."""

from __future__ import annotations

import pytest
import torch
from operators import LAYOUTS, ROWS, assert_accurate, overloads, poisoning, raising, serving, with_dtypes
from transformers import CLIPTextConfig
from transformers.models.clip.modeling_clip import CLIPTextEmbeddings

from memkern import Role, ops, token_roles

VOCABULARY, EOT = 50, 49


def sample(batch=3, length=77, width=40, dtype=torch.float32):
    torch.manual_seed(4)
    ids = torch.randint(1, EOT, (batch, length))
    ids[:, length // 3 :] = EOT
    roles = token_roles(ids, eos_token_id=EOT)
    return ids, roles, torch.randn(VOCABULARY, width).to(dtype), torch.randn(length, width).to(dtype), 0


def by_hand(ids, roles, token_weight, position_weight, pad_id):
    out = torch.empty(*ids.shape, token_weight.shape[1], dtype=token_weight.dtype)
    for b in range(ids.shape[0]):
        for position in range(ids.shape[1]):
            token = pad_id if roles[b, position] == Role.PAD else ids[b, position]
            out[b, position] = token_weight[token] + position_weight[position]
    return out


@pytest.mark.parametrize(("target", "dtype"), with_dtypes(ROWS))
@pytest.mark.parametrize("width", [1, 8, 33, 768])
def test_against_float64(target, dtype, width):
    ids, roles, token_weight, position_weight, pad_id = arguments = sample(width=width, dtype=dtype)
    actual = target(ops.embed_tokens, *arguments)
    exact = by_hand(ids, roles, token_weight.double(), position_weight.double(), pad_id)
    assert_accurate(actual, by_hand(*arguments), exact)


@pytest.mark.parametrize("target", ROWS)
def test_is_clip_with_swapped_ids(target):
    ids, roles, *_ = sample()
    config = CLIPTextConfig(vocab_size=VOCABULARY, hidden_size=40, max_position_embeddings=77)
    module = CLIPTextEmbeddings(config)
    swapped = ids.masked_fill(roles == Role.PAD, 0)
    weights = module.token_embedding.weight.detach(), module.position_embedding.weight.detach()
    assert torch.equal(target(ops.embed_tokens, ids, roles, *weights, 0), module(input_ids=swapped))


@pytest.mark.parametrize("target", ROWS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(target, layout):
    *tensors, pad_id = sample()
    moved = [LAYOUTS[layout](target.put(tensor)) for tensor in tensors]
    actual = target(ops.embed_tokens, *moved, pad_id)
    assert torch.equal(actual, ops.embed_tokens(*tensors, pad_id, backend="torch"))


@pytest.mark.parametrize("target", ROWS)
@pytest.mark.parametrize("batch", [0, 1])
def test_empty_batch_and_width(target, batch):
    ids, roles, token_weight, position_weight, pad_id = sample(1)
    out = target(ops.embed_tokens, ids[:batch], roles[:batch], token_weight[:, :0], position_weight[:, :0], pad_id)
    assert out.shape == (batch, 77, 0)


@pytest.mark.parametrize(("overload", "device"), overloads("embed_tokens"))
@pytest.mark.parametrize("wants_grad", [False, True])
def test_opcheck(overload, device, wants_grad):
    *tensors, pad_id = sample(2, 6, 4)
    ids, roles, *weights = (tensor.to(device) for tensor in tensors)
    weights = [weight.requires_grad_(wants_grad) for weight in weights]
    torch.library.opcheck(overload, (ids, roles, *weights, pad_id))


@pytest.mark.parametrize("target", serving(ROWS, torch.float64))
def test_gradcheck(target):
    ids, roles, token_weight, position_weight, pad_id = sample(2, 6, 2, torch.float64)
    more_positions = torch.cat([position_weight, position_weight])

    def embedded(token_weight, position_weight):
        return target(ops.embed_tokens, ids, roles, token_weight, position_weight, pad_id)

    assert torch.autograd.gradcheck(embedded, (token_weight.requires_grad_(), more_positions.requires_grad_()))


@pytest.mark.parametrize("target", ROWS)
def test_gradients(target):
    ids, roles, *weights, pad_id = sample()
    grads = []
    for run in (target, lambda op, *arguments: op(*arguments, backend="torch")):
        leaves = [weight.clone().requires_grad_() for weight in weights]
        grads.append(torch.autograd.grad(run(ops.embed_tokens, ids, roles, *leaves, pad_id).square().sum(), leaves))
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_compiles_into_one_graph(backend):
    @torch.compile(fullgraph=True, backend="aot_eager")
    def embedded(ids, roles, token_weight, position_weight):
        return ops.embed_tokens(ids, roles, token_weight, position_weight, 0, backend=backend)

    *tensors, _ = sample()
    assert torch.equal(embedded(*tensors), ops.embed_tokens(*tensors, 0))


@pytest.mark.parametrize("target", raising(ROWS))
@pytest.mark.parametrize("bad", [-1, VOCABULARY])
def test_id_out_of_range(target, bad):
    ids, *rest = sample()
    ids[0, 1] = bad
    with pytest.raises((IndexError, RuntimeError), match="out of range"):
        target(ops.embed_tokens, ids, *rest)


@pytest.mark.parametrize("target", poisoning(ROWS))
@pytest.mark.parametrize("bad", [-1, VOCABULARY, 2**40])
def test_id_out_of_range_gives_nan(target, bad):
    ids, *rest = sample()
    expected = ops.embed_tokens(ids, *rest, backend="torch")
    ids[0, 1], expected[0, 1] = bad, float("nan")
    actual = target(ops.embed_tokens, ids, *rest)
    assert torch.equal(actual.nan_to_num(nan=7), expected.nan_to_num(nan=7))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"roles": torch.zeros(3, 77)}, TypeError, "roles: expected dtype torch.uint8, got torch.float32"),
        ({"roles": torch.zeros(77, dtype=torch.uint8)}, ValueError, r"roles: expected shape \[B, L\], got \[77\]"),
        ({"roles": torch.zeros(3, 76, dtype=torch.uint8)}, ValueError, r"roles: expected shape \[3, 77\], got"),
        ({"input_ids": torch.zeros(3, 77)}, TypeError, "input_ids: expected dtype torch.int64"),
        ({"pad_id": VOCABULARY}, ValueError, r"pad_id: expected an id in \[0, 50\), got 50"),
        ({"position_weight": torch.zeros(76, 40)}, ValueError, "input_ids: length 77 is more than the 76 positions"),
        ({"position_weight": torch.zeros(77, 39)}, ValueError, r"position_weight: expected shape \[P, 40\]"),
    ],
)
def test_refusals(change, error, message):
    names = ("input_ids", "roles", "token_weight", "position_weight", "pad_id")
    with pytest.raises(error, match=message):
        ops.embed_tokens(**dict(zip(names, sample(), strict=True)) | change)
