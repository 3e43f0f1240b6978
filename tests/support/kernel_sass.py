"""Reads the machine code of compiled kernels: what a loop issues per element on its fast path, and its barriers."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton

TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);\s*(?:/\*.*)?$", re.MULTILINE)
OPCODE = re.compile(r"(?:@!?\w+\s+)?([A-Z][\w.]*)")


@dataclass(frozen=True)
class Instruction:
    """One line of SASS."""

    address: int
    text: str

    @property
    def opcode(self):
        return OPCODE.match(self.text)[1]

    @property
    def target(self):
        """The address a branch goes to."""
        found = re.search(r"0x([0-9a-f]+)", self.text)
        return int(found[1], 16) if found else None


@dataclass(frozen=True)
class Slots:
    """Of one kernel, per thread: instructions outside loops, then what the loop over siblings holds."""

    outside: int
    loop: int
    barriers: int
    special: int = 0
    """Of the loop: roots, logarithms, sines, which one unit in eight computes;"""
    wide: int = 0
    """products of 64 bits;"""
    loads: int = 0
    """loads of global memory."""
    shortest: int = 0
    """Instructions of the shortest loop: of the step, that of rows without noise."""


def read(cubin):
    """Resources as a dictionary and the instructions in order, without padding."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run([TOOL, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    lines = [Instruction(int(address, 16), text) for address, text in LINE.findall(sass)]
    return dict(re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage)), [i for i in lines if i.opcode != "NOP"]


def fast_path(instructions):
    """Without the blocks that a predicated branch jumps over and that call a subroutine: slow paths of a root."""
    dropped = set()
    for place, instruction in enumerate(instructions):
        if not instruction.opcode.startswith("CALL"):
            continue
        start = next(i for i in range(place, -1, -1) if _skips(instructions[i]))
        end = instructions[start].target
        dropped |= {i for i in range(start + 1, len(instructions)) if instructions[i].address < end}
    return [instruction for place, instruction in enumerate(instructions) if place not in dropped]


def _skips(instruction):
    return instruction.opcode.startswith("BRA") and instruction.text.startswith("@")


def loops(instructions):
    """First and last address of every loop: a branch back, but for the endless one behind a program's end."""
    backward = [i for i in instructions if i.opcode.startswith("BRA") and i.target is not None]
    return [(i.target, i.address) for i in backward if i.target < i.address]


def slots(instructions):
    """What one thread issues: the longest loop is that over siblings."""
    end = max(i.address for i in instructions if i.opcode.startswith("EXIT"))
    found = [(a, b) for a, b in loops(instructions) if b < end]
    main = fast_path([i for i in instructions if i.address <= end])
    bodies = [[i for i in main if a <= i.address <= b] for a, b in found]
    longest = max(bodies, key=len, default=[])
    inside = {i.address for body in bodies for i in body}
    kinds = ("BAR", "MUFU", ("IMAD.WIDE", "IMAD.HI"), "LDG")
    kinds = [sum(i.opcode.startswith(kind) for i in longest) for kind in kinds]
    outside = len([i for i in main if i.address not in inside])
    return Slots(outside, len(longest), *kinds, shortest=min(map(len, bodies), default=0))
