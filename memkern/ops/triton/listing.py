"""Facts read from a compiled kernel's code: products needed and issued, and loads that its main loop waits for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import networkx

_PRODUCTS = re.compile(r"m(\d+)n(\d+)k(\d+)\S*\.(?:f16|bf16)\.(?:f16|bf16)")
_DOT = re.compile(r"tt\.dot .*: tensor<(\d+)x(\d+)x\w+> \* tensor<\d+x(\d+)x")
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);")


def wanted_products(ttir: str) -> int:
    """Multiply-adds of all products in a listing of Triton's own code, each counted once, for a whole block."""
    return sum(int(m) * int(k) * int(n) for m, k, n in _DOT.findall(ttir))


def products(ptx: str, warps: int) -> int:
    """Multiply-adds of all tensor-core instructions in a listing of PTX, each counted once, for a whole block.

    A loop's body appears once in PTX, so this is the count of one turn. `mma` is an instruction of a warp, `wgmma` of
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


def register_loads(ttgir: str) -> int:
    """The loads into registers in a loop with products, in Triton's code after its loops are pipelined.

    Data that such a loop streams should come by cp.async or TMA, which are other operations. A loop is whole here, even
    if the machine code has it unrolled.
    """
    most, loops = 0, list[tuple[bool, int, int]]()  # for each open brace: of a loop, loads and products within
    for line in ttgir.splitlines():
        text = line.strip()
        if text.startswith("}") and loops:
            is_loop, loads, dots = loops.pop()
            if is_loop and dots:
                most = max(most, loads)
            elif loops:
                outer = loops[-1]
                loops[-1] = outer[0], outer[1] + loads, outer[2] + dots
        if loops:
            is_loop, loads, dots = loops[-1]
            loads += " = tt.load " in text
            dots += " = tt.dot " in text or "warp_group_dot " in text or "tc_gen5_mma " in text
            loops[-1] = is_loop, loads, dots
        if text.endswith("{"):
            loops.append(("scf.for" in text or "scf.while" in text, 0, 0))
    return most


def waiting_loads(sass: str) -> int:
    """Loads from device memory into registers (LDG) in a loop of the machine code that has tensor-core products."""
    return _loads_with_products(*_machine_code(sass))


def may_wait(ptx: str) -> bool:
    """True if a loop with products has a load into registers in PTX; without one the machine code has none."""
    return _loads_with_products(*_assembly(ptx)) > 0


_LOAD = ("LDG.", "ld.global")
_PRODUCT = ("HMMA", "HGMMA", "UTCHMMA", "mma.", "wgmma.mma", "tcgen05.mma")


class _Instruction(NamedTuple):
    name: str
    goes_on: bool  # what stands after it may come next
    target: str | None  # the place that it may jump to


def _machine_code(sass: str) -> tuple[list[_Instruction], dict[str, int]]:
    """The instructions, and address → index."""
    code, places = list[_Instruction](), dict[str, int]()
    for address, predicate, name, operands in _INSTRUCTION.findall(sass):
        kind = name.split(".")[0]
        conditional = bool(predicate) or re.search(r"\bU?P\d", operands) is not None
        target = re.search(r"0x([0-9a-f]+)\s*$", operands.strip()) if kind == "BRA" else None
        goes_on = kind not in ("BRA", "EXIT", "RET") or conditional
        places[f"{int(address, 16):x}"] = len(code)
        code.append(_Instruction(name, goes_on, f"{int(target[1], 16):x}" if target else None))
    return code, places


def _assembly(ptx: str) -> tuple[list[_Instruction], dict[str, int]]:
    """The instructions, and label → index."""
    code, places = list[_Instruction](), dict[str, int]()
    for line in map(str.strip, ptx.splitlines()):
        if label := re.match(r"(\$\w+):", line):
            places[label[1]] = len(code)
        elif found := re.match(r"(@!?%\w+\s+)?([a-z][\w.:]*)\s*([^;]*);", line):
            predicate, name, operands = found.groups()
            kind = name.split(".")[0]
            goes_on = kind not in ("bra", "ret", "exit") or bool(predicate)
            code.append(_Instruction(name, goes_on, operands.strip() if kind == "bra" else None))
    return code, places


def _loads_with_products(code: list[_Instruction], places: dict[str, int]) -> int:
    """The most loads of a loop that has products."""
    most = 0
    for body in _loops(code, places):
        names = [code[index].name for index in body]
        if any(name.startswith(_PRODUCT) for name in names):
            most = max(most, sum(name.startswith(_LOAD) for name in names))
    return most


def _loops(code: list[_Instruction], places: dict[str, int]) -> Iterator[Iterable[int]]:
    """Indices of the instructions of each loop: those that can be reached from each other.

    A jump back alone is no loop: the body of a branch may be placed after the code that follows the branch.
    """
    graph = networkx.DiGraph()
    for index, instruction in enumerate(code):
        if instruction.goes_on and index + 1 < len(code):
            graph.add_edge(index, index + 1)
        if instruction.target in places:
            graph.add_edge(index, places[instruction.target])
    return (part for part in networkx.strongly_connected_components(graph) if len(part) > 1)
