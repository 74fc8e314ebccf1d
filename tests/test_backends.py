"""The chooser: errors that auto falls back from, and its log; refusals of a named backend; errors that are raised."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from libraries import write_record
from torch._subclasses.fake_tensor import FakeTensorMode

import memkern
from memkern import ops
from memkern.ops import backends

ARGUMENTS = (torch.randn(1, 3, 4), None, torch.arange(3, dtype=torch.int32)[None], torch.ones(1, 3))


class OutOfResources(Exception):
    """Stands in for Triton's error of that name, where Triton may be absent."""

    __module__ = "triton.runtime.errors"


UNABLE = [
    OutOfResources("out of resource: shared memory, Required: 131072, Hardware limit: 101376"),
    PermissionError(13, "Permission denied", "/nowhere/.triton/cache"),
    ModuleNotFoundError("No module named 'triton'"),
    RuntimeError("memkern_cuda: no kernel image is available for execution on the device"),
    RuntimeError("Failed to find C compiler. Please specify via CC environment variable"),
    NotImplementedError("absorbed_attention: 300 keys, more than 256"),
]
FAULTS = [
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    torch.OutOfMemoryError("CUDA out of memory"),
    IndexError("list index out of range"),
]


@pytest.fixture
def gpu(monkeypatch):
    """The chooser as if the tensors were on a GPU that cuda and triton serve."""
    monkeypatch.setattr(backends, "order", lambda device, operator=None: ("cuda", "triton", "torch"))
    monkeypatch.setattr(backends, "refusals", lambda *_: [])
    monkeypatch.setattr(backends, "_failed", {})
    monkeypatch.setattr(backends, "_logged", set())


def overloads(cuda, triton=None):
    """Backends that return their name, or raise what they are given, and the list of their calls."""
    calls = []

    def backend(name, error):
        def call(*arguments):
            calls.append(name)
            if error is not None:
                raise error
            return name

        return call

    return {name: backend(name, error) for name, error in (("cuda", cuda), ("triton", triton), ("torch", None))}, calls


def run(found):
    return backends.run("edit_embeds", found, *ARGUMENTS)


def test_the_first_that_runs_is_taken(gpu, caplog):
    found, calls = overloads(None)
    assert run(found) == "cuda"
    assert calls == ["cuda"]
    assert not caplog.records


@pytest.mark.parametrize("error", UNABLE, ids=lambda error: type(error).__name__)
def test_auto_falls_back_once_and_says_why(gpu, caplog, error):
    found, calls = overloads(error)
    assert [run(found), run(found)] == ["triton", "triton"]
    assert calls == ["cuda", "triton", "triton"], "a launch that failed is not tried again"
    assert str(error).splitlines()[0] in memkern.info().failures[0]
    found, calls = overloads(error, error)
    with caplog.at_level(logging.WARNING, "memkern"):
        assert [run(found), run(found)] == ["torch", "torch"]
    assert len(caplog.records) == 1
    assert str(error).splitlines()[0] in caplog.text


def test_another_width_is_tried_again(gpu):
    found, calls = overloads(UNABLE[0])
    run(found)
    wider = (torch.randn(1, 3, 8), *ARGUMENTS[1:])
    assert backends.run("edit_embeds", found, *wider) == "triton"
    assert calls == ["cuda", "triton", "cuda", "triton"]


@pytest.mark.parametrize("error", FAULTS, ids=lambda error: type(error).__name__)
def test_a_fault_is_raised(gpu, error):
    found, _ = overloads(error)
    with pytest.raises(type(error)):
        run(found)
    assert not memkern.info().failures


def card(monkeypatch, **properties):
    """Let torch see one GPU with these properties; a gcnArchName makes it a ROCm build."""
    monkeypatch.setattr(torch.version, "hip", "7.0" if "gcnArchName" in properties else None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(**properties))


@pytest.mark.parametrize(
    ("properties", "units"),
    [
        ({"major": 7, "minor": 5}, False),
        ({"major": 8, "minor": 0}, True),
        ({"major": 12, "minor": 1}, True),
        # ROCm counts capabilities too, from 9.0 for an MI50 that has no matrix units.
        ({"major": 9, "minor": 0, "gcnArchName": "gfx906:sramecc+:xnack-"}, False),
        ({"major": 9, "minor": 4, "gcnArchName": "gfx942:sramecc+:xnack-"}, True),
        ({"major": 10, "minor": 3, "gcnArchName": "gfx1030"}, False),
        ({"major": 11, "minor": 0, "gcnArchName": "gfx1100"}, True),
    ],
    ids=str,
)
def test_products_are_left_to_torch_where_triton_has_no_matrix_units(monkeypatch, properties, units):
    card(monkeypatch, **properties)
    every = ("cuda", "triton", "torch")
    assert backends.order(torch.device("cuda"), "edit_embeds") == every
    assert backends.order(torch.device("cuda"), "biased_attention") == (every if units else ("torch",))


def test_info_names_the_architecture(monkeypatch):
    card(monkeypatch, gcnArchName="gfx942:sramecc+:xnack-")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "AMD Instinct MI300X")
    versions = memkern.info().versions
    assert versions["gpu 0"] == "AMD Instinct MI300X, gfx942"
    assert versions["rocm"] == "7.0, for which kernels were compiled but never run"


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_named_backend_raises_for_other_devices(backend):
    if backends.INTERPRETING:
        pytest.skip("the interpreter takes CPU tensors")
    with pytest.raises(ValueError, match=f"backend '{backend}' cannot run: {backend} runs on CUDA tensors, these are"):
        ops.edit_embeds(*ARGUMENTS, backend=backend)


def test_reasons_are_a_list():
    reasons = backends.refusals("cuda", torch.device("cpu"), torch.float32, "biased_attention")
    assert reasons[:2] == ["cuda runs on CUDA tensors, these are on cpu", "cuda has no biased_attention"]
    assert "triton computes float32, float16 and bfloat16, not float64" in backends.refusals(
        "triton", torch.device("cuda"), torch.float64, "edit_embeds"
    )


def test_a_cuda_library_that_does_not_load_is_named_with_both_versions(tmp_path, monkeypatch):
    library = tmp_path / "_cuda.abi3.so"
    assert "not part of this installation" in backends.load_cuda(library)
    library.write_bytes(b"not a library")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert backends.load_cuda(library) == f"torch {torch.__version__} is built without CUDA"
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert backends.load_cuda(library).startswith("the compiled CUDA library is not for ROCm, which torch ")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    expected = f"the compiled CUDA library does not load with torch {torch.__version__} (CUDA 13.0): "
    assert backends.load_cuda(library).startswith(f"{expected}there is no build.json")
    write_record(tmp_path)
    assert backends.load_cuda(library).startswith(expected)
    assert backends.load_cuda(library).endswith("(built with torch 2.99)")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_operator_traces_on_every_device(device):
    """Shapes, dtypes, devices and strides without a kernel."""
    with FakeTensorMode():

        def made(*shape, dtype=torch.float16):
            return torch.empty(shape, dtype=dtype, device=device)

        plan = made(2, 77, dtype=torch.int32), made(2, 77, dtype=torch.float32)
        rows, bias = made(2, 77, 8), made(2, 77, dtype=torch.float32)
        q, k, a = made(2, 3, 5, 8), made(2, 3, 77, 8), made(2, 3, 77, 16)
        ids, roles = made(2, 77, dtype=torch.int64), made(2, 77, dtype=torch.uint8)
        outs = [
            ops.edit_embeds(rows, made(2, 1, 8), *plan),
            ops.edit_kv(rows, rows, None, None, *plan, plan[1])[1],
            ops.embed_tokens(ids, roles, made(50, 8), made(80, 8), 0),
            ops.biased_attention(q, k, k, bias),
            ops.absorbed_attention(made(2, 5, 16), a, bias, a, made(16)),
        ]
        masses = ops.attention_mass(q, k, bias, bias)
    shapes = [(2, 77, 8)] * 3 + [(2, 3, 5, 8), (2, 5, 16)]
    assert [tuple(out.shape) for out in outs] == shapes
    assert all(out.device.type == device and out.dtype == torch.float16 for out in outs)
    assert outs[3].stride() == (120, 8, 24, 1)
    assert [tuple(mass.shape) for mass in masses] == [(2, 3, 77), (2, 3, 5)]
    assert all(mass.device.type == device and mass.dtype == torch.float32 for mass in masses)
