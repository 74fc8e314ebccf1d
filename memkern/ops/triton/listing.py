"""What a compiled kernel's own code says: products that it issues, and loads that its main loop waits for."""

from __future__ import annotations

import re
from collections.abc import Iterator

_PRODUCTS = re.compile(r"m(\d+)n(\d+)k(\d+)\S*\.(?:f16|bf16)\.(?:f16|bf16)")
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);")


def products(ptx: str, warps: int) -> int:
    """Multiply-adds of all tensor-core instructions in a listing of PTX, each counted once, for a whole block.

    A loop's body stands in PTX once, so this is what one turn issues. `mma` is an instruction of a warp, `wgmma` of
    four.
    """
    total = 0
    for line in ptx.splitlines():
        text = line.strip()
        group = text.startswith("wgmma.mma_async")
        if group or text.startswith("mma.sync"):
            found = _PRODUCTS.search(text)
            if found is None:
                raise ValueError(f"expected the shape of a product, got {text[:80]!r}")
            m, n, k = map(int, found.groups())
            total += m * n * k * (warps // 4 if group else warps)
    return total


def waiting_loads(sass: str) -> int:
    """Loads from device memory into registers (LDG) that stand in a loop with tensor-core products.

    What such a loop streams should come by LDGSTS (cp.async) or UTMALDG (TMA), which nothing waits for at once.
    """
    code = list(_instructions(sass))
    most = 0
    for body in _loops(code):
        if any(name.startswith(("HMMA", "HGMMA", "UTCHMMA")) for name in body):
            most = max(most, sum(name.split(".")[0] == "LDG" for name in body))
    return most


def _instructions(sass: str) -> Iterator[tuple[int, str, str]]:
    for address, name, operands in _INSTRUCTION.findall(sass):
        yield int(address, 16), name, operands


def _loops(code: list[tuple[int, str, str]]) -> Iterator[list[str]]:
    """Names of the instructions of each loop: from the target of a branch back to the branch."""
    for address, name, operands in code:
        target = re.search(r"0x([0-9a-f]+)\s*$", operands.strip())
        if name.split(".")[0] == "BRA" and target is not None and int(target[1], 16) < address:
            start = int(target[1], 16)
            yield [other for at, other, _ in code if start <= at <= address]
