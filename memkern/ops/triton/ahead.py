"""Compile a launch for a card that is not here, and read what the compiled kernel uses."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .launch import Launch

SHARED_LIMITS = {75: 65536, 80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
"""Shared memory that one block may use, in bytes, by compute capability (CUDA programming guide)."""

_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
}


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel takes of a multiprocessor.

    Attributes:
        registers: per thread.
        stack: local memory per thread in bytes; more than 0 means that registers spill.
        shared: bytes per block.
    """

    registers: int
    stack: int
    shared: int


def compile_ahead(launch: Launch, capability: int) -> Usage:
    """Compile `launch` for compute capability `capability`, 80 for 8.0. No GPU is needed."""
    signature, constants, attributes = specialization(launch)
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(launch.options))
    return _usage(compiled)


def specialization(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], Any]]:
    """What a launch compiles for, as Triton decides it: types by name, constants, and what is divisible by 16.

    Tensors may be on the meta device; they count as aligned to 16 bytes, as torch aligns them.
    """
    signature: dict[str, str] = {}
    constants = dict(launch.constants)
    attributes: dict[tuple[int, ...], Any] = {}
    for position, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments.get(parameter.name)
        special = value if isinstance(value, int) and not parameter.do_not_specialize else None
        if value is None or special == 1:
            signature[name] = "constexpr"
            constants.setdefault(name, value)
        elif isinstance(value, torch.Tensor):
            signature[name] = f"*{_TYPES[value.dtype]}"
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
        if isinstance(value, torch.Tensor) or (special is not None and special % 16 == 0):
            attributes[(position,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _usage(compiled: Any) -> Usage:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        report = subprocess.run(
            [str(tool), "-res-usage", cubin.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", report)
    if found is None:
        raise RuntimeError(f"cuobjdump: expected REG and STACK, got {report!r}")
    return Usage(int(found[1]), int(found[2]), compiled.metadata.shared)
