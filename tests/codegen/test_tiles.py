"""What runs across the rows of memory is read and written tile by tile, each line once; no bit depends on it."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minifuse.records import RECORDS


def run(fn: Callable[..., Tensor], *args: Tensor, dynamic: bool = False) -> tuple[Tensor, str]:
    torch._dynamo.reset()
    out = torch.compile(fn, backend="minifuse", dynamic=dynamic)(*args)
    return out, RECORDS[-1].stages["unit"].source


def add_turned(x: Tensor, y: Tensor) -> Tensor:
    return x + y.transpose(-1, -2)


@pytest.mark.parametrize("shape", [(64, 256), (100, 300), (1, 17), (300, 20), (65, 257), (513, 1031), (3, 70, 90)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int8, torch.int64])
def test_a_transposed_operand_is_eagers(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = (torch.randn(shape) * 20).to(dtype)
    y = (torch.randn(*shape[:-2], shape[-1], shape[-2]) * 20).to(dtype)
    out, _ = run(add_turned, x, y)
    assert torch.equal(out, add_turned(x, y))


def test_its_tile_is_turned_once_in_front_of_its_loops() -> None:
    x, y = torch.randn(1000, 2000), torch.randn(2000, 1000)
    out, source = run(add_turned, x, y)
    assert torch.equal(out, add_turned(x, y))
    assert "mf_stage_f32(" in source and "mf_loads_f32(" not in source.split("static void k_")[-1]


@pytest.mark.parametrize("shape", [(7, 9), (130, 270), (1000, 2000)])
def test_a_transpose_itself_a_part_of_one_and_several_at_once(shape: tuple[int, int]) -> None:
    x = torch.randn(shape)
    for fn in (
        lambda x: x.t().contiguous(),
        lambda x: x[1:, 2:].t() * 2 + x[1:, 2:].t().exp(),
        lambda x: (x * 2).t().contiguous() + x.sin().t(),
    ):
        out, _ = run(fn, x)
        torch.testing.assert_close(out, fn(x))


def two_turned(x: Tensor, y: Tensor) -> Tensor:
    return (x * 2 + y.sin() + x.mul(y)).transpose(-1, -2).contiguous()


@pytest.mark.parametrize("shape", [(64, 256), (100, 300), (17, 1), (300, 20), (65, 257), (513, 1031), (3, 70, 90)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_transposed_result_of_several_operands_is_the_plain_ones(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, y = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    out, _ = run(two_turned, x, y)
    plain, _ = run(lambda x, y: x * 2 + y.sin() + x.mul(y), x, y)
    assert torch.equal(out, plain.transpose(-1, -2))


def test_a_stored_tile_is_turned_once_behind_its_loops() -> None:
    out, source = run(two_turned, torch.ones(1000, 2000), torch.ones(1000, 2000))
    loops = source.split("static void k_")[-1]
    assert "mf_stage_f32(p" in loops and "mf_stores_f32(" not in loops
    assert out.shape == (2000, 1000)


def test_rows_that_are_looked_up_are_eagers() -> None:
    """The index is the same for a whole tile, and is not in its place."""

    def fn(x: Tensor, y: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        return x[at].transpose(1, 2).contiguous() * 2, y[at].transpose(1, 2) + x[at].transpose(1, 2)

    for width in (64, 40):
        x, y, at = torch.randn(4, width, 32), torch.randn(4, width, 32), torch.tensor([2, 1, 3])
        torch._dynamo.reset()
        for mine, eager in zip(torch.compile(fn, backend="minifuse")(x, y, at), fn(x, y, at), strict=True):
            assert torch.equal(mine, eager)


@pytest.mark.parametrize("shape", [(3, 64, 48), (2, 20, 300), (5, 130, 64), (2, 256, 196)])
def test_rows_reduced_across_memory_are_eagers(shape: tuple[int, ...]) -> None:
    """A layer norm over channels of planes, forward and backward, and a sum beside it."""

    def fn(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.nn.functional.layer_norm(x.transpose(1, 2), w.shape, w)
        return y, (y * 2).transpose(1, 2).contiguous() + x.amax(1, keepdim=True)

    found = []
    for compiled in (False, True):
        x, w = torch.randn(shape, generator=torch.Generator().manual_seed(0)), torch.linspace(0.5, 1.5, shape[1])
        x.requires_grad_()
        w.requires_grad_()
        torch._dynamo.reset()
        y, z = (torch.compile(fn, backend="minifuse") if compiled else fn)(x, w)
        (y.sin().sum() + z.square().sum()).backward()
        found.append([y, z, x.grad, w.grad])
    for eager, mine in zip(*found, strict=True):
        torch.testing.assert_close(mine, eager, rtol=1e-4, atol=1e-4)


def test_a_masked_load_reads_no_more_than_is_there(tmp_path: Path) -> None:
    """Memory that ends with a page: what lies behind it is not mapped."""
    script = textwrap.dedent("""
        import ctypes, mmap, torch
        import minifuse

        def ending_with_a_page(x):
            memory = mmap.mmap(-1, -(-x.nbytes // 4096) * 4096 + 4096)
            start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
            assert not ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + len(memory) - 4096), 4096, 0)
            ending_with_a_page.kept = [*getattr(ending_with_a_page, "kept", []), memory]
            y = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=len(memory) - 4096 - x.nbytes)
            return y.view(x.shape).copy_(x)

        def turned(x, y):
            return torch.cat([x, y]).transpose(1, 2).contiguous() * 2

        x, y = (ending_with_a_page(torch.randn(n, 64, 1024)) for n in (2, 1))
        out = torch.compile(turned, backend="minifuse")(x, y)
        assert torch.equal(out, turned(x, y))
    """)
    path = tmp_path / "script.py"
    path.write_text(script)
    done = subprocess.run([sys.executable, str(path)], cwd=Path(__file__).parents[2], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])})  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


def test_sizes_known_at_the_call() -> None:
    torch._dynamo.reset()
    f = torch.compile(add_turned, backend="minifuse", dynamic=True)
    for n, m in ((40, 50), (300, 20), (33, 1000), (1000, 700)):
        x, y = torch.randn(n, m), torch.randn(m, n)
        assert torch.equal(f(x, y), add_turned(x, y))


def test_any_number_of_threads_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.randn(500, 600), torch.randn(600, 500)
    found: list[Any] = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(run(add_turned, x, y)[0])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(out, found[0]) for out in found)
