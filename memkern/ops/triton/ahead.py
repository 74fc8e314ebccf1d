"""Compile a launch for a card that is not here, and read the resources that the compiled kernel uses."""

from __future__ import annotations

import math
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

from .configs import Card
from .launch import Launch
from .listing import may_wait, products, register_loads, waiting_loads, wanted_products
from .sizes import up

SHARED_LIMITS = {
    "sm75": 65536, "sm80": 166912, "sm86": 101376, "sm89": 101376, "sm90": 232448, "sm100": 232448, "sm120": 101376,
    "gfx90a": 65536, "gfx942": 65536, "gfx950": 163840, "gfx1100": 65536, "gfx1201": 65536,
}  # fmt: skip
"""Shared memory (AMD: LDS) that one block may use, in bytes (CUDA programming guide; LLVM's AMDGPU usage)."""

PROCESSOR_SHARED = {
    "sm75": 65536, "sm80": 167936, "sm86": 102400, "sm89": 102400, "sm90": 233472, "sm100": 233472, "sm120": 102400,
}  # fmt: skip
"""Shared memory of a multiprocessor in bytes; each block takes 1024 of it besides its own."""

PROCESSOR_WARPS = {"sm75": 32, "sm80": 64, "sm86": 48, "sm89": 48, "sm90": 64, "sm100": 64, "sm120": 48}

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
    """The resources of a multiprocessor that a compiled kernel takes.

    Attributes:
        registers: per thread; on AMD vector registers.
        stack: local memory per thread in bytes; more than 0 means that registers spill.
        shared: bytes per block.
    """

    registers: int
    stack: int
    shared: int

    def blocks(self, family: str, warps: int) -> int:
        """Blocks that one NVIDIA multiprocessor holds at a time, by registers, shared memory and warps."""
        by_registers = 65536 // (warps * 32 * up(self.registers, 8))
        by_shared = PROCESSOR_SHARED[family] // (self.shared + 1024)
        return max(0, min(by_registers, by_shared, PROCESSOR_WARPS[family] // warps))


@dataclass(frozen=True)
class Review:
    """The findings in the code of a compiled launch, and its resources.

    Attributes:
        usage: the resources that it takes.
        redundancy: products that a block issues to tensor cores, divided by those that its tiles need.
        waiting: loads into registers in a loop that has such products.
        blocks: its blocks on one multiprocessor at a time.
        waves: how many times its programs fill all multiprocessors.
        through_l2: bytes that its programs load and store by their tiles; None for a launch that was not estimated.
    """

    usage: Usage
    redundancy: float
    waiting: int
    blocks: int
    waves: float
    through_l2: float | None


def compile_ahead(launch: Launch, family: str) -> Usage:
    """Compile `launch` for a family of cards, "sm80" or "gfx942". No GPU is needed."""
    return _usage(_compiled(launch, family), family)


def review(launch: Launch, card: Card) -> Review:
    """Compile `launch` as `compile_ahead` does for an NVIDIA card, and read its code as well.

    Products are those of `mma` and `wgmma`; those of compute capability 10.0, `tcgen05`, are not counted. The machine
    code is disassembled, which takes a quarter of the time, only where PTX leaves open whether a loop waits for loads.
    """
    compiled = _compiled(launch, card.family)
    usage, warps = _usage(compiled, card.family), compiled.metadata.num_warps
    waiting = register_loads(compiled.asm["ttgir"])
    if may_wait(compiled.asm["ptx"]):
        waiting = max(waiting, waiting_loads(_dumped(compiled, "-sass")))
    wanted, blocks = wanted_products(compiled.asm["ttir"]), usage.blocks(card.family, warps)
    work = launch.work
    return Review(
        usage,
        products(compiled.asm["ptx"], warps) / wanted if wanted else 1.0,
        waiting,
        blocks,
        math.prod(launch.grid) / (card.processors * max(1, blocks)),
        None if work is None else work.programs * work.through_l2,
    )


def target_of(family: str) -> GPUTarget:
    """The target that Triton compiles for."""
    if family.startswith("sm"):
        return GPUTarget("cuda", int(family[2:]), 32)
    return GPUTarget("hip", family, 64 if family.startswith("gfx9") else 32)


def _compiled(launch: Launch, family: str) -> Any:
    signature, constants, attributes = specialization(launch)
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target_of(family), options=dict(launch.options))


def specialization(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], Any]]:
    """The specialization of a launch, as Triton decides it: types by name, constants, and arguments divisible by 16.

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


def _usage(compiled: Any, family: str) -> Usage:
    if not family.startswith("sm"):
        found = {
            name: int(value)
            for name, value in re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s+(\d+)", compiled.asm["amdgcn"])
        }
        return Usage(found["vgpr_count"], found["private_segment_fixed_size"], compiled.metadata.shared)
    report = _dumped(compiled, "-res-usage")
    taken = re.search(r"REG:(\d+) STACK:(\d+)", report)
    if taken is None:
        raise RuntimeError(f"cuobjdump: expected REG and STACK, got {report!r}")
    return Usage(int(taken[1]), int(taken[2]), compiled.metadata.shared)


def _dumped(compiled: Any, part: str) -> str:
    """What cuobjdump shows of the machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(_TOOLS / "cuobjdump"), part, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
