"""The C compiler of this machine: which it is, what it can do, and how one C unit becomes a shared library.

Generated code includes no header and links almost nothing. `GOMP_parallel` (declared by hand, no -fopenmp) is
resolved from the OpenMP runtime that torch has mapped already, so that a process never holds two; libmvec is
loaded globally; Sleef's functions are resolved from the `libtorch_cpu` that is mapped, by its name.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
import warnings
import weakref
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from minifuse.codegen.c_prelude import MathLibrary, candidates
from minifuse.codegen.unit import PART
from minifuse.errors import CompileError

# -O1 is the lowest level that turns the lane loops of the prelude into whole-register code. Integers wrap, as in
# torch; no multiply and add is contracted, so that fusion cannot change a bit.
BASE_FLAGS = (
    "-std=gnu11 -O1 -fopenmp-simd -fno-math-errno -fno-trapping-math -ffp-contract=off -fno-strict-aliasing "
    "-fwrapv -fPIC -fvisibility=hidden -w -Wno-psabi"
).split()
_TARGET: tuple[str, ...] = ("-mcpu=native",) if platform.machine() in ("arm64", "aarch64") else ("-march=native",)
# Short of registers, gcc 12 keeps integers in those of MMX, which are the x87 unit's too, and leaves them marked as in
# use: `fmod` of doubles in the C library, and so torch's own `remainder`, answers NaN from then on.
_WITHOUT = ("-mno-mmx",)
# gcc splits copies of values wider than a register into 16-byte pieces unless told; the vectoriser prefers 256 bits.
_WIDE = {
    "avx512": ("-mprefer-vector-width=512", "-mmove-max=512", "-mstore-max=512"),
    "avx2": ("-mmove-max=256", "-mstore-max=256"),
}
# The macros that the compiler must define for an instruction set, best first.
_ISAS = (
    ("avx512", ("__AVX512F__", "__AVX512BW__", "__AVX512DQ__", "__AVX512VL__")),
    ("avx2", ("__AVX2__", "__FMA__", "__F16C__")),
    ("baseline", ("__SSE2__",)),
    ("neon", ("__aarch64__",)),
)
_TIMEOUT = 600.0


@dataclass(frozen=True)
class Toolchain:
    """A working compiler. `flags` and `libs` go on its command line; `machine` digests the macros that the compiler
    predefines under them: a library built with -march=native on another processor must not be loaded here."""

    compiler: tuple[str, ...]
    version: str
    flags: tuple[str, ...]
    libs: tuple[str, ...]
    maths: MathLibrary
    isa: str
    openmp: bool
    machine: str

    @property
    def key(self) -> str:
        """Text that differs when a compiled library would."""
        maths = f"{self.maths.isa} {self.maths.precise} {' '.join(sorted(self.maths.symbols))}"
        return "\n".join((*self.compiler, self.version, *self.flags, *self.libs, maths, self.machine))


def find(precise: bool = False) -> Toolchain | None:
    """The first of $MINIFUSE_CC, $CC, cc, gcc, clang that works, or None; `MINIFUSE_CC=""` means none.

    Asked once a process for each value of these variables. `precise` selects maths within 1 ulp. A variable that
    names nothing usable is one warning, and the next is tried; nothing is tried after $MINIFUSE_CC.
    """
    return _find(os.environ.get("MINIFUSE_CC"), os.environ.get("CC"), precise)


@lru_cache(maxsize=16)
def _find(forced: str | None, cc: str | None, precise: bool) -> Toolchain | None:
    chosen = ("CC", cc) if forced is None else ("MINIFUSE_CC", forced)
    for name in (chosen[1], *(("cc", "gcc", "clang") if forced is None else ())):
        if not name or name.isspace():
            continue
        found = _working(name)
        if not isinstance(found, str):
            return _toolchain(*found, precise)
        if name is chosen[1]:
            _warn_unusable(*chosen, found)
    return None


@lru_cache(maxsize=16)
def _warn_unusable(variable: str, value: str, why: str) -> None:
    then = "tries cc, gcc and clang" if variable == "CC" else "has no C compiler"
    expected = "expected the command of a C compiler such as gcc or clang"
    warnings.warn(f"minifuse {then}: ${variable} is {value!r}, {why}; {expected}", stacklevel=4)


def _working(name: str) -> tuple[tuple[str, ...], tuple[str, ...], dict[str, str]] | str:
    """A command's words, the flags for this processor and the macros under them; or what is wrong with it."""
    try:
        words = shlex.split(name)
    except ValueError as error:
        return f"which no shell would read ({error})"
    path = shutil.which(words[0]) if words else None
    if path is None:
        return "which is no program on the path"
    compiler = (path, *words[1:])
    for target in (_TARGET, ()):
        macros = _macros(compiler, target)
        if macros is not None:
            return compiler, target, macros
    return "which does not preprocess an empty file of C"


def _macros(compiler: tuple[str, ...], flags: tuple[str, ...]) -> dict[str, str] | None:
    """The compiler's predefined macros under `flags`, or None when it does not run, refuses them or predefines none:
    a program that ignores what it is asked is no compiler, whatever its exit status."""
    command = [*compiler, *BASE_FLAGS, *flags, "-Werror", "-dM", "-E", "-xc", os.devnull]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
    if done.returncode:
        return None
    return dict(re.findall(r"^#define (\w+) (.*)$", done.stdout, re.M)) or None


def _toolchain(compiler: tuple[str, ...], target: tuple[str, ...], macros: dict[str, str], precise: bool) -> Toolchain:
    isa = next((name for name, needed in _ISAS if all(m in macros for m in needed)), "scalar")
    flags = (*BASE_FLAGS, *target)
    for more in (_WIDE.get(isa, ()), _WITHOUT if "__x86_64__" in macros or "__i386__" in macros else ()):
        if more and _macros(compiler, (*target, *more)) is not None:
            flags = (*flags, *more)
    libs, openmp = _openmp()
    version = macros.get("__VERSION__", "").strip('"')
    maths = MathLibrary(isa, _symbols(isa), precise)
    machine = hashlib.sha256(repr(sorted(macros.items())).encode()).hexdigest()[:16]
    return Toolchain(compiler, version, flags, libs, maths, isa, openmp, machine)


@lru_cache(maxsize=1)
def _libmvec() -> ctypes.CDLL | None:
    """glibc's vector maths, loaded for the process so that generated libraries find it; None elsewhere."""
    try:
        return ctypes.CDLL("libmvec.so.1", mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return None


@lru_cache(maxsize=1)
def _libtorch() -> tuple[str, ctypes.CDLL] | None:
    """The file of libtorch_cpu that torch has loaded, and a handle on it."""
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        return str(path), ctypes.CDLL(str(path))
    except OSError:
        return None


@lru_cache(maxsize=8)
def _symbols(isa: str) -> frozenset[str]:
    torch_lib = _libtorch()
    libraries = {"libmvec": _libmvec(), "sleef": torch_lib[1] if torch_lib else None}
    return frozenset(s for name, symbols in candidates(isa).items() for s in symbols if hasattr(libraries[name], s))


def _openmp() -> tuple[tuple[str, ...], bool]:
    """What to link for `GOMP_parallel`, and whether there is one: torch's runtime and no other."""
    if hasattr(ctypes.CDLL(None), "GOMP_parallel"):
        return (), True
    for path in mapped_openmp():
        if hasattr(ctypes.CDLL(path), "GOMP_parallel"):
            return (path,), True
    return (), False


def mapped_openmp() -> tuple[str, ...]:
    """The files of the OpenMP runtimes that this process has mapped (Linux; empty elsewhere)."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return ()
    paths = {line.split(maxsplit=5)[5] for line in lines if len(line.split(maxsplit=5)) == 6}
    return tuple(sorted(p for p in paths if re.match(r"lib(gomp|iomp5|omp)\b", os.path.basename(p))))


class Compiling:
    """The compiler at work on one C unit, in processes of its own: several where the unit is large, each compiling a
    part of it (`codegen.unit.PARTS`). Nothing is left behind, whatever happens."""

    def __init__(self, source: str, toolchain: Toolchain, others: int = 0) -> None:
        """`others`: processors to leave to what runs meanwhile."""
        self.source = source
        self.folder = tempfile.TemporaryDirectory(prefix="minifuse-cc-")
        unit, self.library, self.words = (Path(self.folder.name, name) for name in ("unit.c", "unit.so", "words"))
        unit.write_text(source)
        parts = min(_cores() - others, source.count("#if MF_HERE(") // PART)
        build = [*toolchain.compiler, *toolchain.flags]
        self.link = ["-shared", "-o", str(self.library)]
        if "Sleef_" in source:
            self.link += ["-Wl,--no-as-needed", _torch_stub(toolchain.compiler)]
        self.link += [*toolchain.libs, "-lm"]
        if parts > 1:
            objects = [f"{self.folder.name}/part{k}.o" for k in range(parts)]
            self.link = [*build, *objects, *self.link]
            commands = [
                [*build, f"-DMF_PARTS={parts}", f"-DMF_PART={k}", "-c", str(unit), "-o", made]
                for k, made in enumerate(objects)
            ]
        else:
            commands, self.link = [[*build, str(unit), *self.link]], []
        self.begin, self.seconds = time.perf_counter(), 0.0
        self.running: list[tuple[list[str], subprocess.Popen[bytes]]] = []
        self.refused: CompileError | None = None
        self.end = weakref.finalize(self, _stop, self.running, self.folder)
        for command in commands:
            self.start(command)

    def start(self, command: list[str]) -> None:
        try:
            with open(self.words, "a") as words:
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=words, stderr=words, start_new_session=True
                )
            self.running.append((command, process))
        except OSError as error:
            self.refused = CompileError(command, str(error), self.source)

    def wait(self, until: float) -> None:
        while self.running and self.refused is None:
            command, process = self.running[0]
            try:
                status = process.wait(max(until - time.perf_counter(), 0.0))
            except subprocess.TimeoutExpired:
                taken = f"no result after {until - self.begin:g} s"
                raise CompileError(command, taken, self.source) from None
            self.running.pop(0)
            if status:
                raise CompileError(command, self.words.read_text(errors="replace"), self.source)
        if self.refused is not None:
            raise self.refused

    def result(self, timeout: float = _TIMEOUT) -> bytes:
        """The bytes of the shared library.

        Raises CompileError with the command, the compiler's words and the source when it fails or takes longer than
        `timeout` seconds.
        """
        try:
            self.wait(self.begin + timeout)
            if self.link:
                self.start(self.link)
                self.wait(self.begin + timeout)
            self.seconds = time.perf_counter() - self.begin
            if not self.library.exists():
                words = self.words.read_text(errors="replace")
                raise CompileError(self.link, f"it exited with 0 and wrote no library {words}", self.source)
            return self.library.read_bytes()
        finally:
            self.end()


def _stop(running: list[tuple[list[str], subprocess.Popen[bytes]]], folder: tempfile.TemporaryDirectory[str]) -> None:
    """End the compilers that run, and what they started, and remove what they wrote."""
    for _, process in running:
        if process.poll() is None:
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    folder.cleanup()


def _cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def compile_shared(source: str, toolchain: Toolchain, timeout: float = _TIMEOUT) -> bytes:
    """The bytes of the shared library of one C unit: see `Compiling`."""
    return Compiling(source, toolchain).result(timeout)


@lru_cache(maxsize=4)
def _torch_stub(compiler: tuple[str, ...]) -> str:
    """An empty library of libtorch_cpu's name to link against: the linker takes 0.2 s to read the real one.

    The loader resolves the name to the libtorch_cpu that is mapped. Kept for the life of the process.
    """
    folder = _stub_folder()
    source, stub = Path(folder, "stub.c"), Path(folder, "libtorch_cpu.so")
    source.write_text("int minifuse_stub;\n")
    command = [*compiler, "-shared", "-fPIC", "-nostdlib", "-Wl,-soname,libtorch_cpu.so", str(source), "-o", str(stub)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise CompileError(command, done.stderr, source.read_text())
    return str(stub)


_folders: list[tempfile.TemporaryDirectory[str]] = []


def _stub_folder() -> str:
    _folders.append(tempfile.TemporaryDirectory(prefix="minifuse-link-"))
    return _folders[-1].name


def load(path: str | os.PathLike[str]) -> ctypes.CDLL:
    """A compiled library, mapped. Raises OSError when it is damaged or lacks a symbol that it needs."""
    _libmvec()
    _libtorch()
    return ctypes.CDLL(os.fspath(path), mode=os.RTLD_NOW | os.RTLD_LOCAL)
