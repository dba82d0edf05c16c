"""Launches choose their variant by alignment and sizes, and compile each once. The GPU is a stand-in here."""

from __future__ import annotations

import ctypes
import threading
import weakref
from typing import Any

import pytest
import torch

from minifuse import compat_triton
from minifuse.codegen.program import write_program
from minifuse.codegen.triton import write_kernel
from minifuse.ir.parse import parse, parse_kernel
from minifuse.ir.plan import Launch, Plan
from minifuse.options import Options
from minifuse.passes import schedule_triton
from minifuse.passes.context import CompileContext
from minifuse.records import RECORDS
from minifuse.runtime.program import adopt
from minifuse.runtime.triton_launch import Launched, TritonProgram, compile_all, share
from minifuse.runtime.triton_run import Run, starter


class Compiled:
    """What `triton.compile` gives, which notes its launches."""

    def __init__(self, launches: list[Any], signature: dict[str, str], divisible: list[int]) -> None:
        self.launches, self.signature, self.divisible = launches, signature, divisible

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        return lambda *args, stream: self.launches.append((grid, args, stream, self.signature, self.divisible))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    found: list[Any] = []
    compiles: list[Any] = []

    def compile(
        function: Any, signature: dict[str, str], divisible: list[int], warps: int, target: Any, constants: Any
    ) -> Compiled:
        compiles.append((signature, divisible, constants))
        assert compiles.count(compiles[-1]) == 1, "compiled again"
        return Compiled(found, signature, divisible)

    monkeypatch.setattr(compat_triton, "triton_compile", compile)
    return found


def launched(text: str, hint: int = 64) -> Launched:
    kernel = parse_kernel(text)
    schedule = schedule_triton.choose(kernel, lambda e: e.evaluate({s.name: hint for s in e.symbols()}))
    step = Launch(kernel, tuple(p.name for p in kernel.params), schedule)
    one = Launched(None, step, write_kernel(step), torch.device("cuda", 0))
    one.at = tuple(range(len(one.kernel.symbols)))
    return one


STATIC = """kernel double  i < 5000
  param x : f32[5000]
  param out : f32[5000]
  store out[i] = add(load x[i], load x[i])
"""
DYNAMIC = """kernel double  i < s0
  sizes s0 >= 0
  param x : f32[s0]
  param out : f32[s0]
  store out[i] = add(load x[i], load x[i])
"""


def test_aligned_and_other_pointers_have_a_variant_each(launches: list[Any]) -> None:
    one = launched(STATIC)
    for pointers in ([16, 4096], [16, 4100], [32, 64], [20, 64]):
        assert one(pointers, [], 7) == 0
    assert [divisible for *_, divisible in launches] == [[0, 1], [], [0, 1], []]
    assert launches[0][1:3] == ((16, 4096), 7)
    (programs, _, _) = launches[0][0]
    assert programs * sum(schedule_triton.blocks(one.step.schedule).values()) >= 5000  # type: ignore[arg-type]


BATCH = """kernel double  i < 16*n
  sizes n >= 0, s0 >= 0
  param x : f32[16*n]
  param out : f32[16*n]
  store out[i] = add(load x[i], load x[i])
  schedule i: grid tile 64, i: lane
  over x, y; n = 5
  over u, v; n = s0
  over w, z; n = 0
"""


def test_a_batch_is_launched_with_tables(launches: list[Any]) -> None:
    found = parse(BATCH)
    step = Launch(found.kernel, found.binding, found.schedule, found.name, found.sizes)
    one = Launched(None, step, write_kernel(step), torch.device("cpu"))
    one.at = (0,)
    for pointers, size in (([16, 32, 48, 64, 80, 96], 4), ([16, 32, 48, 64, 80, 96], 4), ([16, 32, 48, 68, 80, 96], 1)):
        assert one(pointers, [size], 7) == 0
    assert [grid for grid, *_ in launches] == [(3, 1, 1), (3, 1, 1), (3, 1, 1)]
    assert [args[0] for _, args, *_ in launches] == [16, 16, 1]
    assert launches[0][1] == launches[1][1]
    assert launches[0][3] == {"align": "constexpr", "table": "*i64", "lengths": "*i32", "blocks": "*i32"}
    assert one.tables is not None
    layout = one.tables.layouts[(4,)]
    assert layout.blocks.tolist() == [[0, 0], [0, 1], [1, 0]]
    assert layout.lengths.tolist() == [[5], [4], [0]]


def test_a_tensor_past_two_gigaelements_makes_a_batch_wide(launches: list[Any]) -> None:
    found = parse(BATCH.replace("n = 5", "n = 200000000"))
    step = Launch(found.kernel, found.binding, schedule_triton.choose(found.kernel, lambda e: 1 << 32), found.name,
                  found.sizes)  # fmt: skip
    one = Launched(None, step, write_kernel(step), torch.device("cpu"))
    assert one.usual().wide
    one.at = (0,)
    one([0] * 6, [1], 0)
    assert launches[0][3]["lengths"] == "*i64"


def test_a_size_decides_grid_and_width(launches: list[Any]) -> None:
    one = launched(DYNAMIC)
    for size in (64, 100, 64, 1 << 32):
        one([0, 0], [size], 0)
    widths = [signature["s0"] for *_, signature, _ in launches]
    assert widths == ["i32", "i32", "i32", "i64"]
    assert launches[0][0] == launches[2][0] != launches[3][0]
    assert [divisible for *_, divisible in launches] == [[0, 1, 2], [0, 1], [0, 1, 2], [0, 1, 2]]


def test_nothing_is_launched_over_nothing(launches: list[Any]) -> None:
    assert launched(DYNAMIC)([0, 0], [0], 0) == 0
    assert launches == []


def test_the_memory_of_a_call_lives_as_long_as_its_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels on a device know addresses alone: what is freed at once is the next tensor's."""
    torch._dynamo.reset()
    torch.compile(lambda x: (x.softmax(-1) @ x).softmax(-1) @ x, backend="minifuse")(torch.randn(8, 8))
    plan = RECORDS[-1].stages["memory"]
    host = write_program(plan, (("",),), (), {})
    program = TritonProgram(plan, host, [], (), (), {}, torch.device("cpu"), False)
    program.on_gpu = True
    made: list[weakref.ref[torch.Tensor]] = []
    empty = torch.empty

    def noted(*args: Any, **kwargs: Any) -> torch.Tensor:
        found = empty(*args, **kwargs)
        made.append(weakref.ref(found))
        return found

    monkeypatch.setattr(torch, "empty", noted)
    frame = program.enter(())
    frame.views.clear()  # a plan whose operators read nothing of the arena has none
    (memory,) = made
    assert frame.layout.nbytes
    assert memory() is not None
    del frame
    assert memory() is None


def test_an_operator_may_leave_a_result_undefined() -> None:
    assert adopt(None, (2, 3), (3, 1), torch.float32) is None


START = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, *[ctypes.c_uint] * 7, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p
)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The driver: notes a kernel's function, programs, threads, stream and arguments, and fails for function 99."""
    found: list[Any] = []
    handles: dict[int, int] = {}

    def start(f: int, *rest: int) -> int:
        gx, gy, gz, bx, by, bz, shared, stream, params, _ = rest
        places = ctypes.cast(params, ctypes.POINTER(ctypes.POINTER(ctypes.c_int64)))
        found.append((f, (gx, gy, gz), (bx, by, bz), shared, stream, [places[k][0] for k in range(3)]))
        return 7 if f == 99 else 0

    def handle(compiled: Compiled) -> compat_triton.Handle:
        number = handles.setdefault(id(compiled), 11 + len(handles))
        return compat_triton.Handle(number, 128, 16 * number)

    callback = START(start)
    monkeypatch.setattr(compat_triton, "triton_handle", handle)
    monkeypatch.setattr(compat_triton, "driver_launch", lambda: ctypes.cast(callback, ctypes.c_void_p).value)
    starter.cache_clear()
    yield found
    starter.cache_clear()


def addresses(*items: int) -> Any:
    return (ctypes.c_void_p * len(items))(*items)


def sizes(*items: int) -> Any:
    return (ctypes.c_int64 * max(len(items), 1))(*items)


def test_a_run_is_started_by_one_call(launches: list[Any], started: list[Any]) -> None:
    run = Run([launched(STATIC), launched(STATIC.replace("f32", "f64"))], [("x", "t"), ("t", "y")])
    assert run.names == ("x", "t", "y")
    run.start = starter(None)
    if run.start is None:
        pytest.skip("no C compiler")
    assert run(addresses(16, 32, 48), sizes(), 5) == 0
    assert [args for _, args, *_ in launches] == [(16, 32), (32, 48)]  # the first time by Triton's own launcher
    assert not started
    assert run(addresses(160, 320, 480), sizes(), 6) == 0
    assert len(launches) == 2
    assert [(f, stream, given[:2]) for f, *_, stream, given in started] == [(11, 6, [160, 320]), (12, 6, [320, 480])]
    (programs, _, _), threads, shared = started[0][1:4]
    assert (programs, threads, shared) == (launches[0][0][0], (128, 1, 1), 16 * 11)
    run(addresses(161, 320, 480), sizes(), 6)  # the first one reads what is not on 16 bytes: another variant
    assert [args for _, args, *_ in launches[2:]] == [(161, 320)]
    assert started[2][-1][:2] == [320, 480]
    run(addresses(161, 320, 480), sizes(), 6)
    run(addresses(160, 320, 480), sizes(), 6)  # each variant has its own shared memory
    assert [f for f, *_ in started[3:]] == [13, 12, 11, 12]
    assert all(shared == 16 * f for f, _, _, shared, *_ in started)


def test_a_run_has_a_table_for_each_size(launches: list[Any], started: list[Any]) -> None:
    one = launched(DYNAMIC)
    run = Run([one], [("x", "out")])
    run.start = starter(None)
    if run.start is None:
        pytest.skip("no C compiler")
    for n in (5000, 64, 5000, 64, 0, 0):
        run(addresses(16, 32), sizes(n), 5)
    assert [(args[-1]) for _, args, *_ in launches] == [5000, 64]
    assert [given for *_, given in started] == [[16, 32, 5000], [16, 32, 64]]


def test_what_the_driver_does_not_start_is_tritons_launchers(launches: list[Any], started: list[Any]) -> None:
    run = Run([launched(STATIC), launched(STATIC.replace("f32", "f64")), launched(STATIC.replace("f32", "i32"))],
              [("x", "t"), ("t", "y"), ("y", "x")])  # fmt: skip
    run.start = starter(None)
    if run.start is None:
        pytest.skip("no C compiler")
    run(addresses(16, 32, 48), sizes(), 5)
    (table,) = run.tables.values()
    table.entries[1].function[True] = 99
    del launches[:]
    run(addresses(16, 32, 48), sizes(), 5)
    assert [f for f, *_ in started] == [11, 99, 13]
    assert [args for _, args, *_ in launches] == [(32, 48)]


def test_each_kernel_is_compiled_once_beside_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    made = {k: launched(STATIC.replace("5000", str(5000 + k % 2))) for k in range(4)}
    made[4] = launched(STATIC.replace("f32", "f64"))
    share(made.values())
    together = threading.Barrier(2, timeout=20)  # two at a time, or the test fails
    calls: list[Any] = []

    def compile(function: Any, signature: dict[str, str], *rest: Any) -> Any:
        calls.append((signature, rest[2]))
        if "*fp64" in signature.values():
            raise RuntimeError("no such type")
        together.wait()
        return Compiled([], signature, [])

    monkeypatch.setattr(compat_triton, "triton_compile", compile)
    ctx = CompileContext("f", "inference", Options())
    plan = Plan("f", (), {}, (), ())
    kept = compile_all(made, "a GPU", ctx, plan)
    assert list(kept) == [0, 1, 2, 3]
    assert len(calls) == 3
    assert {target for _, target in calls} == {"a GPU"}
    assert kept[0].variants is kept[2].variants
    assert list(kept[1].variants) == [kept[3].usual()]
    (decision,) = ctx.decisions
    assert decision.rule == "interpreted"
    assert "no such type" in str(decision)
