"""The CUDA kernels compiled for the CPU and called through ctypes, every buffer between poisoned guard zones."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "csrc"
NAMES = {torch.float32: "float32", torch.float64: "float64", torch.float16: "float16", torch.bfloat16: "bfloat16"}
GUARD = 4096
"""Bytes before and behind every buffer."""

POISON = 0xFF
"""The byte around inputs: read as any dtype it is NaN, or an index out of range."""

PATTERN = 0xA5
"""The byte around outputs: another one, so that poison copied there is seen as well."""


def build(sources: Path, folder: Path, compiler: str) -> ctypes.CDLL:
    """Compile the kernel bodies of `sources` for the CPU, into `folder`."""
    library = folder / "kernels.so"
    includes = [f"-I{path}" for path in (sources / "cuda", HERE, *include_paths())]
    command = [compiler, "-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", "-Werror", "-include", "shim.h", *includes]
    subprocess.run([*command, str(HERE / "run.cpp"), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


class Guarded:
    """A tensor's storage between guard zones.

    Values in an input's zones show in the result if they are read; those in an output's zones must still be there
    afterwards.
    """

    def __init__(self, tensor: torch.Tensor, shift: int = 0, zone: int = POISON) -> None:
        """Copy `tensor`, strides included, `shift` bytes off the alignment of 64."""
        self.tensor, self.zone = tensor, zone
        size = tensor.untyped_storage().nbytes()
        self.memory = torch.full((GUARD + shift + size + GUARD + 64,), zone, dtype=torch.uint8)
        start = GUARD + shift + (-self.memory.data_ptr() - GUARD) % 64
        self.inside = slice(start, start + size)
        self.memory[self.inside] = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())

    @property
    def pointer(self) -> int:
        """The address of the first element."""
        offset = self.tensor.storage_offset() * self.tensor.element_size()
        return self.memory.data_ptr() + self.inside.start + offset

    def result(self) -> torch.Tensor:
        """The values now, after a look at the guard zones."""
        outside = torch.cat([self.memory[: self.inside.start], self.memory[self.inside.stop :]])
        assert (outside == self.zone).all(), "written outside the buffer"
        return self.memory[self.inside].clone().view(self.tensor.dtype).view(self.tensor.shape)


class Rows(ctypes.Structure):
    """csrc/rows.h."""

    _fields_ = (("data", ctypes.c_void_p), ("batch_stride", ctypes.c_int64), ("row_stride", ctypes.c_int64))


class EditRows(ctypes.Structure):
    """csrc/cuda/parameters.h."""

    _fields_ = (("rows", Rows), ("bank", Rows), ("scale", ctypes.c_void_p), ("out", ctypes.c_void_p))


class EditPlan(ctypes.Structure):
    """csrc/cuda/parameters.h."""

    _fields_ = (
        ("source", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("count", "length", "bank_length", "width")),
    )


class EmbedTokens(ctypes.Structure):
    """csrc/cuda/parameters.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("ids", "roles", "tokens", "positions", "out")),
        *((name, ctypes.c_int64) for name in ("token_stride", "position_stride", "count", "length")),
        *((name, ctypes.c_int64) for name in ("vocabulary", "width", "pad_id")),
        ("pad_role", ctypes.c_uint8),
    )


def edit(library, edits, source, shift=0, blocks=0):
    """Run edit_rows_kernel; `edits` is one or two of (rows, bank, scale). The outputs, and true if in 16 bytes."""
    batch, length, width = edits[0][0].shape
    plan_source = Guarded(source)
    kept, structures, outputs = [], [], []
    for rows, bank, scale in edits:
        guards = [Guarded(rows, shift), None if bank is None else Guarded(bank, shift), Guarded(scale)]
        out = Guarded(torch.full((batch, length, width), float("nan"), dtype=rows.dtype), shift, PATTERN)
        views = [
            Rows(None, 0, 0) if guard is None else Rows(guard.pointer, *guard.tensor.stride()[:2])
            for guard in guards[:2]
        ]
        structures.append(EditRows(*views, guards[2].pointer, out.pointer))
        kept.append(guards)
        outputs.append(out)
    bank_length = 0 if edits[0][1] is None else edits[0][1].shape[1]
    plan = EditPlan(plan_source.pointer, batch * length, length, bank_length, width)
    array = (EditRows * len(edits))(*structures)
    function = getattr(library, f"edit_{NAMES[edits[0][0].dtype]}")
    function.restype = ctypes.c_bool
    vectors = function(array, len(edits), ctypes.byref(plan), blocks)
    return [out.result() for out in outputs], vectors


def embed(library, ids, roles, tokens, positions, pad_id, shift=0, blocks=0):
    """Run embed_tokens_kernel. The output, and true if in 16 bytes."""
    guards = [Guarded(ids), Guarded(roles), Guarded(tokens, shift), Guarded(positions, shift)]
    out = Guarded(torch.full((*ids.shape, tokens.shape[1]), float("nan"), dtype=tokens.dtype), shift, PATTERN)
    strides = tokens.stride(0), positions.stride(0)
    sizes = ids.numel(), ids.shape[1], tokens.shape[0], tokens.shape[1]
    arguments = EmbedTokens(*(guard.pointer for guard in (*guards, out)), *strides, *sizes, pad_id, 3)
    function = getattr(library, f"embed_{NAMES[tokens.dtype]}")
    function.restype = ctypes.c_bool
    vectors = function(ctypes.byref(arguments), blocks)
    return out.result(), vectors
