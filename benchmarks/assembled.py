"""What an assembler makes of a Triton kernel: registers, spills, loops, accesses, barriers, from its own text.

NVIDIA's comes from `nvdisasm`, which Triton's wheel holds, AMD's is what Triton compiles to. Both are read line by line
into `Instruction`s; a loop is what stands between a label and a branch back to it. How often a loop runs no assembler
says: `executions` takes it from the bytes that the kernel asks for (`benchmarks.requested`).
"""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TARGETS: dict[str, tuple[str, Any, int]] = {
    "cuda:80": ("cuda", 80, 32),
    "cuda:90": ("cuda", 90, 32),
    "cuda:100": ("cuda", 100, 32),
    "hip:gfx942": ("hip", "gfx942", 64),
}


def gpu_target(name: str) -> Any:
    """A GPU to compile for, present or not, as Triton has it: one of `TARGETS`. 3.6-3.9."""
    return importlib.import_module("triton.backends.compiler").GPUTarget(*TARGETS[name])


@dataclass(frozen=True)
class Instruction:
    """An instruction: its name, the line of the kernel's source that it is of (0: another file's), and for an access of
    global memory its bytes a thread. `after` says that it waits for what was loaded before."""

    name: str
    line: int
    load: int = 0
    store: int = 0
    barrier: bool = False
    after: bool = False


@dataclass(frozen=True)
class Loop:
    """Instructions from the first to before the last that run again and again."""

    first: int
    last: int


@dataclass(frozen=True)
class Assembled:
    """A kernel as its target runs it. `registers` are those of a thread, `spilled` and `shared` bytes."""

    threads: int
    registers: int
    spilled: int
    shared: int
    code: tuple[Instruction, ...]
    loops: tuple[Loop, ...]

    @property
    def barriers(self) -> int:
        """Barriers in the text."""
        return sum(i.barrier for i in self.code)

    @property
    def in_flight(self) -> int:
        """The most bytes of loads that a thread has asked for before it waits for one of them."""
        most = found = 0
        for i in self.code:
            found = (0 if i.after else found) + i.load
            most = max(most, found)
        return most

    def innermost(self) -> list[int]:
        """For each instruction the number of the smallest loop that holds it; -1 where none does."""
        found = [-1] * len(self.code)
        for k, loop in sorted(enumerate(self.loops), key=lambda item: item[1].first - item[1].last):
            found[loop.first : loop.last] = [k] * (loop.last - loop.first)
        return found

    def executions(self, lanes: Mapping[int, int], python: Sequence[range]) -> list[float]:
        """How often each instruction runs in a program.

        `lanes` are the bytes that each line asks for in one program, masked ones included; `python` the lines of each
        loop of the source, outer ones first. What a loop asks for over what one pass of its text asks for is how often
        it runs; one that asks for nothing counts once, as often as what it stands in.
        """
        place = self.innermost()
        of_source = {k: _source_loop(self.code[loop.first : loop.last], python) for k, loop in enumerate(self.loops)}
        asked: dict[int, float] = {}
        for line, nbytes in lanes.items():
            at = _innermost(line, python)
            asked[at] = asked.get(at, 0.0) + nbytes
        once: dict[int, float] = {}
        for i, k in zip(self.code, place, strict=True):
            at = of_source.get(k, -1)
            once[at] = once.get(at, 0.0) + (i.load + i.store) * self.threads
        found = []
        for k in place:
            at = of_source.get(k, -1)
            found.append(max(asked.get(at, 0.0) / once[at], 1.0) if k >= 0 and once.get(at) else 1.0)
        return found


def _innermost(line: int, python: Sequence[range]) -> int:
    return max((k for k, lines in enumerate(python) if line in lines), key=lambda k: python[k].start, default=-1)


def _source_loop(code: Sequence[Instruction], python: Sequence[range]) -> int:
    """The loop of the source that most of a loop's instructions are of; -1 where they are of none."""
    votes: dict[int, int] = {}
    for i in code:
        if i.line and (at := _innermost(i.line, python)) >= 0:
            votes[at] = votes.get(at, 0) + 1
    return max(votes, key=lambda at: votes[at], default=-1)


def assembled(made: Any, source: str) -> Assembled:
    """A kernel that Triton compiled (3.6-3.9); `source` is the file that its text stands in."""
    warps = made.metadata.num_warps
    if "amdgcn" in made.asm:
        return _amd(made.asm["amdgcn"], warps * 64, made.metadata.shared)
    return _nvidia(made, source, warps * 32)


# -- NVIDIA -----------------------------------------------------------------------------------------
def tool(name: str) -> Path:
    """A program of CUDA that Triton's wheel holds."""
    return Path(importlib.import_module("triton.backends.nvidia").__file__).parent / "bin" / name


def kernel_resources(made: Any) -> dict[str, int]:
    """Registers and spilled bytes a thread, and shared bytes a program, of a kernel compiled for NVIDIA. 3.6-3.9.

    Triton's metadata has none: the assembler reports them. A stack is no spill: the sine of libdevice has an array
    there for large arguments.
    """
    ptx = made.asm["ptx"]
    assembler = next(t for t in (tool("ptxas-blackwell"), tool("ptxas")) if t.exists())
    (arch,) = re.findall(r"^\.target (sm_\w+)", ptx, re.MULTILINE)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [str(assembler), "-v", f"--gpu-name={arch}", str(source), "-o", f"{folder}/kernel.cubin"]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    (registers,) = re.findall(r"Used (\d+) registers", text)
    spills = re.findall(r"(\d+) bytes spill", text)
    return {"registers": int(registers), "spilled": sum(map(int, spills)), "shared": made.metadata.shared}


_SASS = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?)\s*;")
_SASS_LINE = re.compile(r'\s*//## File "(.*?)", line (\d+)')
_WIDTHS = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


def _nvidia(made: Any, source: str, threads: int) -> Assembled:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(made.asm["cubin"])
        command = [str(tool("nvdisasm")), "-g", "-c", str(cubin)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    code, loops = _read(_sass(text, source))
    return Assembled(threads, *kernel_resources(made).values(), code, loops)


Parsed = tuple[str, Instruction | None, str]
"""A label; or an instruction, and the label that it branches to."""


def _sass(text: str, source: str) -> Iterator[Parsed]:
    line = 0
    loaded: set[str] = set()
    for row in text.splitlines():
        if at := _SASS_LINE.match(row):
            line = int(at[2]) if at[1] == source else 0
        elif row.startswith("$"):  # a routine that is called for odd arguments
            return
        elif label := re.match(r"(\.L_x?\w+):", row):
            yield label[1], None, ""
        elif found := _SASS.match(row):
            name, rest = found.groups()
            if name == "NOP":
                continue
            kind, *marks = name.split(".")
            load, store = _width(kind, marks, "LDG"), _width(kind, marks, "STG")
            registers = re.findall(r"\bR\d+", rest)
            after = bool(loaded & set(registers[1:] if load else registers))
            if after:
                loaded.clear()
            if load and registers:
                first = int(registers[0][1:])
                loaded |= {f"R{first + k}" for k in range(max(load // 4, 1))}
            target = re.search(r"`\((\.L_\w+)\)", rest)
            yield "", Instruction(name, line, load, store, kind == "BAR", after), target[1] if target else ""


def _width(kind: str, marks: Sequence[str], wanted: str) -> int:
    return next((_WIDTHS[m] for m in marks if m in _WIDTHS), 4) if kind == wanted else 0


# -- AMD --------------------------------------------------------------------------------------------
_GCN = re.compile(r"\t([a-z]\w+)(.*)")
_GCN_WIDTHS = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "b128": 16, "b64": 8, "b32": 4}


def _amd(text: str, threads: int, shared: int) -> Assembled:
    def number(key: str) -> int:
        return int(re.search(rf"\.{key}:\s+(\d+)", text)[1])  # type: ignore[index]

    code, loops = _read(_gcn(text))
    return Assembled(threads, number("vgpr_count"), 4 * number("vgpr_spill_count"), shared, code, loops)


def _gcn(text: str) -> Iterator[Parsed]:
    line = 0
    for row in text.split("\n.Lfunc_end")[0].splitlines():
        if at := re.match(r"\t\.loc\t(\d+) (\d+)", row):
            line = int(at[2]) if at[1] == "1" else 0
        elif label := re.match(r"(\.LBB\w+):", row):
            yield label[1], None, ""
        elif found := _GCN.match(row):
            name, rest = found.groups()
            access = re.match(r"(?:global|buffer|flat)_(load|store)_(\w+)", name)
            nbytes = 0
            if access:
                nbytes = next((n for k, n in _GCN_WIDTHS.items() if access[2].startswith(k)), 0)
                nbytes = nbytes or (1 if "byte" in access[2] else 2)
            target = re.search(r"(\.LBB\w+)", rest) if "branch" in name else None
            after = name == "s_waitcnt" and "vmcnt" in rest
            load = nbytes if access and access[1] == "load" else 0
            yield "", Instruction(name, line, load, nbytes - load, name == "s_barrier", after), target[1] if target else ""


def _read(parsed: Iterator[Parsed]) -> tuple[tuple[Instruction, ...], tuple[Loop, ...]]:
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    loops: list[Loop] = []
    for label, instruction, target in parsed:
        if instruction is None:
            labels[label] = len(code)
            continue
        code.append(instruction)
        if target in labels and len(code) - labels[target] > 1:  # the trap behind a program's end branches to itself
            loops.append(Loop(labels[target], len(code)))
    return tuple(code), tuple(loops)
