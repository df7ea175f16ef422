"""Reads NVIDIA machine code without a GPU: what a kernel needs, how wide its accesses are, what its loops cost.

    for name, kernel in read("fastllm/_C_cuda.so", "sm_90").items():
        print(name, kernel.registers, kernel.stack, kernel.widths("STG"), *kernel.loops())

    python tests/machine_code.py FILE [PATTERN]     # a library or a cubin: a line for each kernel, and for each loop

Clocks are Hopper's, of one of a multiprocessor's four parts: an instruction of a warp takes one to issue, a special
function (MUFU) eight (CUDA C++ Programming Guide, "Arithmetic Instructions": 16 results a clock and multiprocessor), a
matrix product 64 x N x 16 of 16-bit numbers N / 2 (the datasheet's dense 989 TFLOP/s at 1.83 GHz: 4,096 operations a
clock and multiprocessor).
"""

from __future__ import annotations

import argparse
import functools
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path


def find_tool(name: str = "cuobjdump") -> str | None:
    """The disassembler that comes with Triton, or else CUDA's."""
    try:
        import triton
    except ImportError:
        return shutil.which(name)
    bundled = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return str(bundled) if bundled.exists() else shutil.which(name)


@dataclass(frozen=True)
class Instruction:
    address: int
    name: str  # with its modifiers, as "LDG.E.128"
    operands: str


@dataclass(frozen=True)
class Loop:
    """The instructions between a branch backwards and where it goes."""

    body: tuple[Instruction, ...]

    def count(self, *names: str) -> int:
        """How many instructions have one of these names, their modifiers aside."""
        return sum(each.name.partition(".")[0] in names for each in self.body)

    @property
    def matrix_clocks(self) -> int:
        """Clocks of a warp group's matrix products: of all four parts of the multiprocessor, and no other group's."""
        shapes = [re.match(r"HGMMA\.64x(\d+)x16", each.name) for each in self.body]
        return sum(int(shape[1]) // 2 for shape in shapes if shape)

    @property
    def special_clocks(self) -> int:
        return 8 * self.count("MUFU")

    def __str__(self) -> str:
        return (
            f"{len(self.body)} instructions, HGMMA {self.matrix_clocks} clocks, MUFU {self.special_clocks} clocks, "
            f"FADD FMUL FFMA {self.count('FADD', 'FMUL', 'FFMA')}, LDS {self.count('LDS', 'LDSM')}, "
            f"STS {self.count('STS', 'STSM')}, LDG {self.count('LDG')}, STG {self.count('STG')}, "
            f"BAR {self.count('BAR')}"
        )


@dataclass
class Kernel:
    registers: int
    stack: int  # bytes of stack frame: spills too
    shared: int  # bytes, the static ones
    code: list[Instruction] = field(default_factory=list)

    def widths(self, name: str) -> dict[int, int]:
        """How many accesses of each width in bits there are: of LDG, STG, LDS and the like."""
        found = Counter()
        for each in self.code:
            first, *modifiers = each.name.split(".")
            if first == name and not each.operands.startswith("RZ"):  # what is loaded for nothing orders other accesses
                found[next((int(m.lstrip("US")) for m in modifiers if re.fullmatch(r"[US]?(8|16|64|128)", m)), 32)] += 1
        return dict(sorted(found.items()))

    def has(self, name: str) -> bool:
        return any(each.name.split(".")[0] == name for each in self.code)

    def loops(self) -> list[Loop]:
        """From the innermost out, the shortest first."""
        found = []
        for each in self.code:
            target = re.search(r"0x([0-9a-f]+)$", each.operands) if each.name.startswith("BRA") else None
            if target and int(target[1], 16) < each.address:
                start = int(target[1], 16)
                found.append(Loop(tuple(i for i in self.code if start <= i.address <= each.address)))
        return sorted(found, key=lambda loop: len(loop.body))

    def main_loop(self) -> Loop:
        """The loop densest in matrix products; without any, the longest that holds no other; without a loop, all."""
        loops = self.loops() or [Loop(tuple(self.code))]
        if self.has("HGMMA"):
            return max(loops, key=lambda loop: loop.matrix_clocks / len(loop.body))
        starts = [(loop.body[0].address, loop.body[-1].address) for loop in loops]
        return next(
            loop
            for loop, (start, end) in reversed(list(zip(loops, starts, strict=True)))
            if not any((start, end) != other and start <= other[0] and other[1] <= end for other in starts)
        )


@functools.cache
def read(path: str | Path, arch: str = "sm_90") -> dict[str, Kernel]:
    """The kernels of a library or a cubin, by their names as C++ writes them (without arguments), or Triton's."""
    tool = find_tool()
    if tool is None:
        raise SystemExit("no cuobjdump: install triton, or run this by .venv/bin/python")
    usage, code = (
        subprocess.run([tool, "-arch", arch, option, path], capture_output=True, text=True, check=True).stdout
        for option in ("-res-usage", "-sass")
    )
    kernels: dict[str, Kernel] = {}
    for name, numbers in re.findall(r"Function (\S+):\n(.*)", usage):
        number = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", numbers)}
        kernels[name] = Kernel(number["REG"], number["STACK"] + number["LOCAL"], number["SHARED"])
    current = None
    for line in code.splitlines():
        if match := re.match(r"\s*Function : (\S+)", line):
            current = kernels[match[1]]
        elif current is not None and (
            match := re.match(r"\s*/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)\s*(.*?)\s*;", line)
        ):
            operands = re.split(r"\s{2,}", match[3])[0]  # without the notes on scheduling of newer chips
            current.code.append(Instruction(int(match[1], 16), match[2], operands))
    return dict(zip(_demangled(list(kernels)), kernels.values(), strict=True))


def _demangled(names: list[str]) -> list[str]:
    tool = shutil.which("c++filt")
    if tool is None or not any(name.startswith("_Z") for name in names):
        return names
    lines = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    shortened = [re.sub(r"^void |fastllm::|\(anonymous namespace\)::", "", line) for line in lines.splitlines()]
    return [line.partition("(")[0] if "(" in line.partition(">")[2] else line for line in shortened]


def main() -> None:
    parser = argparse.ArgumentParser(description="Registers, widths of accesses in bits and loops of sm_90's kernels.")
    parser.add_argument("file", help="a library or a cubin")
    parser.add_argument("pattern", nargs="?", default="", help="of the kernels' names")
    args = parser.parse_args()
    if not Path(args.file).exists():
        parser.error(f"there is no {args.file}")
    try:
        kernels = read(args.file)
    except subprocess.CalledProcessError:
        parser.error(f"{args.file} holds no machine code for sm_90")
    if not any(re.search(args.pattern, name) for name in kernels):
        parser.error(f"no kernel's name has {args.pattern!r}")
    for name, kernel in kernels.items():
        if re.search(args.pattern, name):
            widths = ", ".join(f"{each} {kernel.widths(each)}" for each in ("LDG", "STG") if kernel.has(each))
            print(
                f"{name}: {kernel.registers} registers, stack {kernel.stack}, {len(kernel.code)} instructions, {widths}"
            )
            for loop in kernel.loops():
                print(f"    loop: {loop}")


if __name__ == "__main__":
    main()
