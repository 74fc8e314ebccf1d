"""Compile a launch for a card that is not here, and read what the compiled kernel uses."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .launch import Launch
from .listing import products, waiting_loads

SHARED_LIMITS = {75: 65536, 80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
"""Shared memory that one block may use, in bytes, by compute capability (CUDA programming guide)."""

PROCESSOR_SHARED = {75: 65536, 80: 167936, 86: 102400, 89: 102400, 90: 233472, 100: 233472, 120: 102400}
"""Shared memory of a multiprocessor in bytes; each block takes 1024 of it beside its own."""

PROCESSOR_WARPS = {75: 32, 80: 64, 86: 48, 89: 48, 90: 64, 100: 64, 120: 48}

_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"

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

    def blocks(self, capability: int, warps: int) -> int:
        """Blocks that one multiprocessor holds at a time, by registers, shared memory and warps."""
        by_registers = 65536 // (warps * 32 * 8 * -(-self.registers // 8))
        by_shared = PROCESSOR_SHARED[capability] // (self.shared + 1024)
        return max(0, min(by_registers, by_shared, PROCESSOR_WARPS[capability] // warps))


@dataclass(frozen=True)
class Review:
    """What the code of a compiled kernel says beyond what it takes.

    Attributes:
        usage: what it takes.
        products: multiply-adds that a block issues to tensor cores, the body of a loop counted once.
        waiting: loads into registers in a loop that has such products.
        blocks: of it on one multiprocessor at a time.
    """

    usage: Usage
    products: int
    waiting: int
    blocks: int


def compile_ahead(launch: Launch, capability: int) -> Usage:
    """Compile `launch` for compute capability `capability`, 80 for 8.0. No GPU is needed."""
    return _usage(_compiled(launch, capability))


def review(launch: Launch, capability: int) -> Review:
    """Compile `launch` as `compile_ahead` does, and read its code as well.

    Products are those of `mma` and `wgmma`; of compute capability 10.0, whose products are `tcgen05`, none is counted.
    """
    compiled = _compiled(launch, capability)
    usage, warps = _usage(compiled), compiled.metadata.num_warps
    with _cubin(compiled) as path:
        waiting = waiting_loads(_run("cuobjdump", "-sass", path))
    return Review(usage, products(compiled.asm["ptx"], warps), waiting, usage.blocks(capability, warps))


def _compiled(launch: Launch, capability: int) -> Any:
    signature, constants, attributes = specialization(launch)
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(launch.options))


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
    with _cubin(compiled) as path:
        report = _run("cuobjdump", "-res-usage", path)
    found = re.search(r"REG:(\d+) STACK:(\d+)", report)
    if found is None:
        raise RuntimeError(f"cuobjdump: expected REG and STACK, got {report!r}")
    return Usage(int(found[1]), int(found[2]), compiled.metadata.shared)


@contextmanager
def _cubin(compiled: Any) -> Iterator[str]:
    """The path of a file with the machine code, while it is needed."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        yield file.name


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([str(_TOOLS / tool), *arguments], capture_output=True, text=True, check=True).stdout
