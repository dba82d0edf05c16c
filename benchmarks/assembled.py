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
from dataclasses import dataclass, replace
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
    rare: bool = False


@dataclass(frozen=True)
class Access:
    """A thread's access of global memory, of so many bytes, through the parameter of a number; -1 where that is not to
    be seen."""

    param: int
    nbytes: int
    store: bool


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
    accesses: tuple[Access, ...]

    def wide(self, store: bool, asked: Mapping[int, float], unmasked: Mapping[int, float]) -> float | None:
        """The share of loads or stores that are of 128 bits or more, by the bytes that are asked for through each
        parameter; None where there are none. A parameter that has an access with a mask beside an equal one without
        has them in turn: `unmasked` says which share of its bytes goes by the one without."""
        shares: dict[int, list[int]] = {}
        for access in self.accesses:
            if access.store == store:
                shares.setdefault(access.param, []).append(access.nbytes)
        weights = {param: asked.get(param, 0.0) if len(shares) > 1 else 1.0 for param in shares}
        every = sum(weights.values())
        found = sum(weights[param] * _wide(widths, unmasked.get(param, 0.0)) for param, widths in shares.items())
        return found / every if every else None

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

    def of_source(self, python: Sequence[PythonLoop]) -> list[int]:
        """For each loop the one of the source that it is; -1 where that is not to be seen. The innermost loops stand in
        the same order in both, if none was unrolled; another is what holds the innermost ones that it holds."""
        inner = [k for k, one in enumerate(self.loops) if not any(_within(other, one) for other in self.loops)]
        inner.sort(key=lambda k: self.loops[k].first)
        leaves = [k for k, one in enumerate(python) if not any(other.inside(one) for other in python)]
        found = [-1] * len(self.loops)
        if len(inner) == len(leaves):
            for k, leaf in zip(inner, leaves, strict=True):
                found[k] = leaf
        for k in sorted(range(len(self.loops)), key=lambda k: self.loops[k].last - self.loops[k].first):
            held = [found[j] for j in range(len(self.loops)) if _within(self.loops[j], self.loops[k])]
            if found[k] < 0 and held and held[-1] >= 0:
                around = [j for j, one in enumerate(python) if python[held[-1]].inside(one)]
                found[k] = max(around, key=lambda j: python[j].lines.start, default=-1)
        return found

    def executions(self, lanes: Mapping[int, float], python: Sequence[PythonLoop]) -> list[float]:
        """How often each instruction runs in a program.

        `lanes` are the bytes that each line asks for in one program, masked ones included; `python` the loops of the
        source, outer ones first. What a loop asks for over what one pass of its text asks for is how often it runs; of
        one that asks for nothing the source says it, where its bounds are numbers.
        """
        place, of_source = self.innermost(), self.of_source(python)
        asked: dict[int, float] = {}
        for line, nbytes in lanes.items():
            inside = [k for k, one in enumerate(python) if line in one.lines]
            at = max(inside, key=lambda k: python[k].lines.start, default=-1)
            asked[at] = asked.get(at, 0.0) + nbytes
        once: dict[int, float] = {}
        for i, k in zip(self.code, place, strict=True):
            at = of_source[k] if k >= 0 else -1
            once[at] = once.get(at, 0.0) + (i.load + i.store) * self.threads
        found = []
        for i, k in zip(self.code, place, strict=True):
            at = of_source[k] if k >= 0 else -1
            often = 1.0 if at < 0 else asked.get(at, 0.0) / once[at] if once.get(at) else python[at].trips
            found.append(0.0 if i.rare else max(often, 1.0))
        return found


def _wide(widths: Sequence[int], unmasked: float) -> float:
    """The share of accesses that are wide."""
    wide = sum(n for n in widths if n >= 16)
    return unmasked if unmasked > 0.5 and sum(widths) <= 2 * wide < 2 * sum(widths) else wide / sum(widths)


@dataclass(frozen=True)
class PythonLoop:
    """A loop of a kernel's source: its lines, and how often it runs in all, 1 where its bounds are no numbers."""

    lines: range
    trips: float

    def inside(self, other: PythonLoop) -> bool:
        """Whether this loop stands in another. A loop is not in itself."""
        return (
            self.lines != other.lines and self.lines.start >= other.lines.start and self.lines.stop <= other.lines.stop
        )


def _within(one: Loop, other: Loop) -> bool:
    return one != other and one.first >= other.first and one.last <= other.last


def assembled(made: Any, source: str) -> Assembled:
    """A kernel that Triton compiled (3.6-3.9); `source` is the file that its text stands in."""
    warps = made.metadata.num_warps
    if "amdgcn" in made.asm:
        return _amd(made.asm["amdgcn"], warps * 64, made.metadata.shared)
    return _nvidia(made, source, warps * 32)


# -- NVIDIA -----------------------------------------------------------------------------------------
def tool(name: str) -> Path:
    """A program of CUDA that Triton's wheel holds."""
    return Path(str(importlib.import_module("triton.backends.nvidia").__file__)).parent / "bin" / name


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
    found = kernel_resources(made)
    return Assembled(threads, found["registers"], found["spilled"], found["shared"], code, loops,
                     tuple(_ptx(made.asm["ptx"])))  # fmt: skip


_PTX_ACCESS = re.compile(r"\b(ld|st)\.global\S*?(?:\.v(\d))?\.[a-z](\d+)\s.*?\[\s*(%rd\d+)")
_PTX_PARAM = re.compile(r"\sld\.param\.[a-z]64\s+(%rd\d+), \[\w+_param_(\d+)\]")
_PTX_MOVE = re.compile(r"\s(?:add|mad|mov|cvta\S*|selp)\.\S+\s+(%rd\d+), (.*);")


def _ptx(text: str) -> Iterator[Access]:
    """Accesses and whose they are: the assembler keeps their widths, and neither keeps their lines."""
    whose: dict[str, int] = {}
    for row in text.splitlines():
        if found := _PTX_PARAM.search(row):
            whose[found[1]] = int(found[2])
        elif found := _PTX_MOVE.search(row):
            known = [whose[r] for r in re.findall(r"%rd\d+", found[2]) if r in whose]
            if known:
                whose[found[1]] = known[0]
        elif found := _PTX_ACCESS.search(row):
            yield Access(whose.get(found[4], -1), int(found[2] or 1) * int(found[3]) // 8, found[1] == "st")


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
    accesses = tuple(Access(-1, i.load + i.store, i.store > 0) for i in code if i.load + i.store)
    return Assembled(threads, number("vgpr_count"), 4 * number("vgpr_spill_count"), shared, code, loops, accesses)


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
            yield (
                "",
                Instruction(name, line, load, nbytes - load, name == "s_barrier", after),
                target[1] if target else "",
            )


ROUTINE = 16
"""Instructions that set up a call of a routine for odd arguments, at most."""


def _read(parsed: Iterator[Parsed]) -> tuple[tuple[Instruction, ...], tuple[Loop, ...]]:
    """The instructions and the loops of a text. What a branch leaps over and calls a routine is for odd arguments, such
    as a quotient that is no normal number: `rare`."""
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    branches: list[tuple[int, str]] = []
    for label, instruction, target in parsed:
        if instruction is None:
            labels[label] = len(code)
            continue
        code.append(instruction)
        if target:
            branches.append((len(code), target))
    loops = []
    for at, target in branches:
        to = labels.get(target, at)
        if to < at - 1:  # the trap behind a program's end branches to itself
            loops.append(Loop(to, at))
        elif to - at <= ROUTINE and any(i.name.startswith("CALL") for i in code[at:to]):
            code[at:to] = [replace(i, rare=True) for i in code[at:to]]
    return tuple(code), tuple(loops)
