"""What goes wrong outside of the compiler: results stay right, and the user is told what to do."""

from __future__ import annotations

import dataclasses
import os
import signal
import stat
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minifuse import backend
from minifuse.codegen.unit import KernelText
from minifuse.errors import CompileError
from minifuse.ir.ops import TABLE
from minifuse.records import RECORDS
from minifuse.runtime import build, loading, toolchain
from tests.judge import compiled, records, same, twin

ROOT = Path(__file__).resolve().parent.parent


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.gelu(self.norm(self.a(x)))).log_softmax(-1)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No compiled unit is taken from this process, nor a warning from an earlier test."""
    torch.manual_seed(0)
    monkeypatch.setattr(loading, "_loaded", {})
    backend.warn_no_compiler.cache_clear()
    loading.disk_cache.cache_clear()
    yield
    loading.disk_cache.cache_clear()
    backend.warn_no_compiler.cache_clear()


def train(options: dict[str, Any] | None = None) -> None:
    """A training step of the compiled model gives eager's output and gradients."""
    model, x = Net(), torch.randn(5, 6)
    eager = twin(model)
    out, want = compiled(model, options)(x), eager(x)
    same(out, want, tolerance=1e-5)
    out.square().sum().backward()
    want.square().sum().backward()
    same([p.grad for p in model.parameters()], [p.grad for p in eager.parameters()], tolerance=1e-4)


def interpreted() -> list[str]:
    return [d.words for r in RECORDS for d in r.decisions if d.rule == "interpreted"]


def python(program: str, *args: str, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program, *args], cwd=ROOT, env=os.environ | env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process: subprocess.Popen[str], seconds: float = 240) -> str:
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == 0, err
    return out


# -- the C compiler -----------------------------------------------------------------------------------
def test_no_compiler_is_one_warning_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIFUSE_CC", "")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train()
        train()
    (said,) = [str(w.message) for w in caught if "compiler" in str(w.message)]
    assert "apt-get install gcc" in said


def test_no_compiler_still_draws_dropout_from_torchs_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> tuple[Tensor, Tensor]:
        x = torch.ones(40, 40, requires_grad=True)
        torch.manual_seed(1)
        out = compiled(lambda x: F.dropout(x * 2, 0.5))(x)
        out.sum().backward()
        assert x.grad is not None
        return out.detach(), x.grad

    want = run()
    monkeypatch.setenv("MINIFUSE_CC", "")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        same(run(), want, exact=True)


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The C compiler refuses every kernel that has an erf."""
    write = build.write_kernel

    def broken(launch: Any) -> KernelText:
        text = write(launch)
        return KernelText(text.name, text.text + "\nthis is no C;\n", text.messages) if "erf" in text.text else text

    monkeypatch.setattr(build, "write_kernel", broken)


@pytest.mark.usefixtures("refused")
def test_a_kernel_that_does_not_compile_falls_back_alone() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train()
    assert interpreted() and all("refused it" in words and "this is no C" in words for words in interpreted())
    whole = sum(len(r.stages["memory"].launches) for r in RECORDS)
    assert 0 < len(interpreted()) < whole
    assert any(r.stages["unit"].source for r in records())


@pytest.mark.usefixtures("refused")
def test_a_kernel_that_does_not_compile_is_a_fallback_like_others() -> None:
    x = torch.randn(9)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        same(compiled(lambda x: x.erf() + 1, {"fallback": "warn"})(x), x.erf() + 1, tolerance=1e-5)
    (said,) = [str(w.message) for w in caught if "minifuse" in str(w.message)]
    assert "minifuse interprets" in said and "this is no C" in said and "test_faults.py" in said
    with pytest.raises(
        Exception, match=r"FallbackError: minifuse interprets (.|\n)*this is no C(.|\n)*test_faults\.py"
    ):
        compiled(lambda x: x.erf() + 2, {"fallback": "error"})(x)


def test_a_compiler_that_fails_at_everything_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: toolchain.Compiling, timeout: float = 0) -> bytes:
        raise CompileError(("cc", "unit.c"), "no space left on device", self.source)

    monkeypatch.setattr(toolchain.Compiling, "result", fails)
    train({"cache_dir": None})
    assert any("no space left" in words for words in interpreted())


def test_a_compiler_that_fails_once_is_survived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result, calls = toolchain.Compiling.result, []

    def flaky(self: toolchain.Compiling, timeout: float = 60) -> bytes:
        calls.append(self.source)
        if len(calls) == 1:
            raise CompileError(("cc",), "killed", self.source)
        return result(self, timeout)

    monkeypatch.setattr(toolchain.Compiling, "result", flaky)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train({"cache_dir": str(tmp_path)})
    assert any("killed" in str(w.message) for w in caught)


# -- the cache ----------------------------------------------------------------------------------------
def test_a_damaged_entry_is_a_miss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train({"cache_dir": str(tmp_path)})
    entries = {p: p.read_bytes() for p in tmp_path.iterdir()}
    assert len(entries) == 2
    for path, data in entries.items():
        path.unlink()  # this process has the old file mapped
        path.write_bytes(data[: len(data) // 2] + b"\0" * (len(data) - len(data) // 2))
    monkeypatch.setattr(loading, "_loaded", {})
    train({"cache_dir": str(tmp_path)})
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {p.name: b for p, b in entries.items()}


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_read_only_cache_is_one_warning(tmp_path: Path) -> None:
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.warns(UserWarning, match="read-only"):
        train({"cache_dir": str(tmp_path)})


@pytest.mark.parametrize("path", ["/proc/nothing/here", "file"])
def test_a_cache_that_cannot_be_made_is_one_warning(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(UserWarning, match="minifuse compiles anew in every process"):
        train({"cache_dir": str(tmp_path / path)})


def test_a_full_disk_is_survived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Any, key: str, data: bytes) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("minifuse.runtime.cache.DiskCache._write", full)
    with pytest.warns(UserWarning, match="No space left"):
        train({"cache_dir": str(tmp_path)})
    assert interpreted() == []


COMPILE = """
import sys, torch
torch.manual_seed(0)
def f(x):
    return (x.sin() * 2.71 + x.exp()).softmax(-1)
run = torch.compile(f, backend="minifuse", options={"cache_dir": sys.argv[1]})
x = torch.randn(8, 32)
torch.testing.assert_close(run(x), f(x))
print("right")
"""


def test_two_processes_compile_one_graph_at_once(tmp_path: Path) -> None:
    both = [python(COMPILE, str(tmp_path)) for _ in range(2)]
    assert [finish(p).strip() for p in both] == ["right", "right"]
    assert len(list(tmp_path.iterdir())) == 1


def test_an_interrupt_while_compiling_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = toolchain.Compiling.result

    def interrupted(self: toolchain.Compiling, timeout: float = 60) -> bytes:
        result(self, timeout)
        raise KeyboardInterrupt

    monkeypatch.setattr(toolchain.Compiling, "result", interrupted)
    x = torch.randn(7)
    run = compiled(lambda x: x.sin() * 1.5 + 2, {"cache_dir": str(tmp_path), "debug_dir": str(tmp_path / "dump")})
    with pytest.raises(KeyboardInterrupt):
        run(x)
    assert not list(tmp_path.iterdir()) and not len(RECORDS)
    monkeypatch.setattr(toolchain.Compiling, "result", result)
    same(run(x), x.sin() * 1.5 + 2)


def test_an_interrupt_by_signal_ends_the_process_and_the_compiler(tmp_path: Path) -> None:
    slow = tmp_path / "slow-cc"
    slow.write_text('#!/bin/sh\ncase "$*" in *unit.c*) touch "$0.started"; sleep 60;; esac\nexec gcc "$@"\n')
    slow.chmod(0o755)
    cache = tmp_path / "cache"
    # what a shell starts in the background ignores the signal, and so do its children
    heard = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    process = python(heard + COMPILE, str(cache), MINIFUSE_CC=str(slow), TMPDIR=str(tmp_path))
    deadline = time.monotonic() + 120
    while not Path(f"{slow}.started").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0 and "KeyboardInterrupt" in err
    assert not [p for p in tmp_path.iterdir() if p.name.startswith("minifuse-")]
    assert not cache.exists() or not list(cache.iterdir())


# -- names --------------------------------------------------------------------------------------------
def test_odd_names_of_modules_and_files_break_nothing(tmp_path: Path) -> None:
    kind = type('Ünïcode "quoted" */ \n #define', (Net,), {})
    source = 'def f(x):\n    return (x * 2).sin() + 1  # "quoted" */ \\ \u2028 {braces} %s\n'
    space: dict[str, Any] = {}
    exec(compile(source, 'odd "file" */ \\ ü\n.py', "exec"), space)
    model = kind()
    model.add_module('a "b" \\n c', nn.Linear(3, 3))
    options = {"debug_dir": str(tmp_path)}
    x = torch.randn(4, 6)
    same(compiled(model, options)(x), model(x), tolerance=1e-5)
    same(compiled(space["f"], options)(x), space["f"](x))
    assert all(p.name.replace("_", "").isalnum() for p in tmp_path.iterdir())


def test_parameters_named_like_keywords_or_generated_names() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("class_", "P", "frame", "torch", "args", "for", "int", "restrict", "ünïcode", "run0", "err"):
                self.register_parameter(name, nn.Parameter(torch.randn(3)))

        def forward(self, b_args: Tensor, lambda_: Tensor) -> Tensor:
            out = b_args * lambda_
            for p in self.parameters():
                out = (out + p).sin()
            return out

    model = Named()
    args = torch.randn(2, 3), torch.randn(3)
    same(compiled(model)(*args), model(*args), tolerance=1e-5)


# -- after a failure, after a fork ----------------------------------------------------------------------
def test_an_error_inside_a_program_leaves_it_usable() -> None:
    run = compiled(lambda i, w: (F.embedding(i, w).sin() + 1).softmax(-1))
    w = torch.randn(5, 64)
    good = torch.tensor([0, 4, 2])
    want = run(good, w)
    for _ in range(10):
        with pytest.raises(IndexError):
            run(torch.tensor([0, 7, 2]), w)
        same(run(good, w), want, exact=True)


@pytest.mark.parametrize(
    ("f", "found"),
    [
        (lambda x, i: x[:, i] + 1, r"index out of bounds for dimension 1 of 5 elements \(test_faults\.py:\d+\)"),
        (lambda x, i: F.embedding(i, x), r"index out of range in self: dimension 0 of 3 elements \(test_faults"),
        (lambda x, i: x.t().index_select(0, i), r"index out of range in self: dimension 0 of 5 elements \(test_faults"),
        (lambda x, i: x.gather(1, i[None]), r"index out of bounds for dimension 1 of 5 elements \(test_faults"),
        (lambda x, i: x.index_add(1, i, x[:, :1]), r"index out of bounds for dimension 1 of 5 elements \(test_faults"),
    ],
)
@pytest.mark.parametrize("target", ["c", "interpret"])
def test_an_index_that_is_out_of_range_says_the_extent_and_the_line(f: Any, found: str, target: str) -> None:
    x = torch.randn(3, 5)
    with pytest.raises(IndexError, match=found):
        compiled(f, {"target": target}, dynamic=False)(x, torch.tensor([7]))


def test_code_that_moves_in_its_file_is_compiled_once(tmp_path: Path) -> None:
    source, x = "def f(x, i):\n    return x[i].sin() * 1.25 + 1\n", torch.randn(9)
    for above in ("", "# a line more\n"):
        space: dict[str, Any] = {}
        exec(compile(above + source, "moved.py", "exec"), space)
        with pytest.raises(IndexError, match=rf"of 9 elements \(moved\.py:{2 + bool(above)}\)"):
            compiled(space["f"], {"cache_dir": str(tmp_path)})(x, torch.tensor([9]))
    assert len(list(tmp_path.iterdir())) == 1


def test_an_operator_that_raises_leaves_its_program_usable() -> None:
    run = compiled(lambda x: torch.linalg.cholesky(x.sin() + x) * 2)
    good = torch.eye(3) * 4
    want = run(good)
    with pytest.raises(RuntimeError):
        run(-good)
    same(run(good), want, exact=True)


FORK = """
import os, sys, torch
torch.set_num_threads(2)
f = torch.compile(lambda x: (x.sin() + 1).softmax(-1) @ x.t(), backend="minifuse")
g = torch.compile(lambda x: x.cos().sum(0) - x, backend="minifuse")
x = torch.randn(512, 256)
want, other = f(x), x.cos().sum(0) - x
child = os.fork()
if child == 0:
    torch.set_num_threads(1)
    # numpy compares: eager itself waits for ever for the OpenMP threads that a forked child lacks
    ok = (f(x).numpy() == want.numpy()).all() and abs(g(x).numpy() - other.numpy()).max() < 1e-3
    os._exit(0 if ok else 3)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 0, status
assert torch.equal(f(x), want)
print("right")
"""


def test_a_forked_child_runs_and_compiles() -> None:
    assert finish(python(FORK), 120).strip() == "right"


def test_the_threads_of_a_forked_child_are_its_own() -> None:
    program = FORK.replace("    torch.set_num_threads(1)\n", "").replace(" @ x.t()", "")
    assert finish(python(program), 120).strip() == "right"


def test_a_fork_while_another_thread_compiles_does_not_hang() -> None:
    entered, done = threading.Event(), threading.Event()

    def hold() -> None:
        with backend._compiling:
            entered.set()
            done.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    entered.wait(60)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python warns of a fork with threads
        child = os.fork()
    if child == 0:
        os._exit(0 if backend._compiling.acquire(timeout=5) else 1)
    done.set()
    holder.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# -- a large unit, compiled in parts ------------------------------------------------------------------
def many(x: torch.Tensor) -> torch.Tensor:
    for op in (torch.sin, torch.cos, torch.exp, torch.tanh, torch.erf, torch.sigmoid, torch.relu, torch.abs, torch.neg,
               torch.square, torch.floor, torch.ceil, torch.log1p, torch.expm1, torch.atan, torch.sinh, torch.cosh,
               torch.asinh, torch.sign, torch.trunc):  # fmt: skip
        x = op(x * 0.1) + 0.5
    return x


@pytest.mark.parametrize("cores", [1, 2, 5])
def test_a_large_unit_in_parts_is_the_unit(cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "_cores", lambda: cores)
    started: list[list[str]] = []
    start = toolchain.Compiling.start

    def watch(self: toolchain.Compiling, command: list[str]) -> None:
        started.append(command)
        start(self, command)

    monkeypatch.setattr(toolchain.Compiling, "start", watch)
    x = torch.linspace(-1, 1, 100)
    out = compiled(many, {"fusion_fuel": 0, "cache_dir": str(tmp_path)})(x)
    same(out, many(x), tolerance=1e-5)
    assert interpreted() == []
    parts = {1: 0, 2: 2, 5: 2}[cores]
    assert sum("-c" in command for command in started) == parts and len(started) == (parts + 1 if parts else 1)
    whole = compiled(many, {"cache_dir": str(tmp_path)})(x)
    assert torch.equal(out, whole)


def test_a_part_that_does_not_compile_is_interpreted_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "_cores", lambda: 2)
    monkeypatch.setitem(TABLE, "tanh", dataclasses.replace(TABLE["tanh"], c="(this is no C)"))
    x = torch.linspace(-1, 1, 100)
    same(compiled(many, {"fusion_fuel": 0, "cache_dir": str(tmp_path)})(x), many(x), tolerance=1e-5)
    assert len(interpreted()) == 1
