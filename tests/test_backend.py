"""What a caller can see of a compiled function is what eager would have shown."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minifuse.records import RECORDS
from tests.judge import check, compiled, externs, kernels, records, same, shares, twin

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def test_the_entry_point_is_enough() -> None:
    program = (
        "import torch; f = torch.compile(lambda x: x.sin() + 1, backend='minifuse'); x = torch.randn(5);"
        "assert 'minifuse' in torch._dynamo.list_backends(None);"
        "torch.testing.assert_close(f(x), x.sin() + 1); import sys; assert 'minifuse.backend' in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


# -- dtypes -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", FLOATS)
def test_floats_keep_their_dtype_and_their_gradients(dtype: torch.dtype) -> None:
    def f(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = (x * 2.5 + y).tanh()
        return z.softmax(-1), (z / 3).sum(0)

    args = [torch.randn(4, 7, dtype=dtype, requires_grad=True) for _ in range(2)]
    check(f, *args, tolerance=None if dtype in FLOATS[:2] else 2e-2)


@pytest.mark.parametrize("dtype", INTS)
def test_integers_wrap_divide_and_compare_as_eager(dtype: torch.dtype) -> None:
    def f(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return x * 3 + y, x // y, x % y, x / y, x > y, x & y, ~x, x.sum(), x.max(), x.float() ** 0.5

    low = 0 if dtype is torch.uint8 else -100
    x = torch.randint(low, 100, (5, 9)).to(dtype)
    y = torch.randint(1, 50, (5, 9)).to(dtype)
    check(f, x, y)


def test_bools_are_logic() -> None:
    def f(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        return a & b, a | b, a ^ b, ~a, a + b, a * b, a.any(0), b.all(), a.sum(), torch.where(a, 1.0, b)

    check(f, torch.rand(6, 5) > 0.5, torch.rand(6, 5) > 0.5, exact=True)


def test_mixed_dtypes_are_promoted_as_in_eager() -> None:
    def f(h: Tensor, x: Tensor, i: Tensor, b: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        return h + x, h * i, i + b, x * b, h + s, i + s, i / 2, h * 3, torch.where(b, h, x), i + 2.5

    args = (torch.randn(3, 4).bfloat16(), torch.randn(3, 4), torch.arange(12).view(3, 4), torch.rand(3, 4) > 0.5)
    check(f, *args, torch.tensor(2.0, dtype=torch.float64))


def test_complex_numbers_go_to_aten() -> None:
    def f(x: Tensor) -> tuple[Tensor, Tensor]:
        z = torch.view_as_complex(x.reshape(3, 4, 2)) * torch.tensor(2 + 1j)
        return z, torch.view_as_real(z).sum(-1).sin()

    check(f, torch.randn(3, 8))


def test_views_of_complex_numbers_share_memory_when_they_are_returned() -> None:
    def f(x: Tensor) -> tuple[Tensor, ...]:
        z = torch.complex(x, x)
        return z, z.real, torch.view_as_real(z), z.conj(), z.imag

    check(f, torch.randn(7))


# -- sizes ------------------------------------------------------------------------------------------
class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 16), nn.Linear(16, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


def test_dynamic_sizes_compile_once() -> None:
    model, graphs = Block(), []
    run = compiled(model, dynamic=True)
    for n in (3, 5, 17, 2):
        x = torch.randn(n, n + 1, 8, requires_grad=True)
        out = run(x)
        same(out, model(x))
        same(torch.autograd.grad(out.sum(), x), torch.autograd.grad(model(x).sum(), x))
        graphs.append(len(records("forward")))
    assert graphs == [1, 1, 1, 1]
    assert len(records("backward")) == 1


def test_a_marked_dimension_compiles_once() -> None:
    run = compiled(lambda x: x.softmax(-1) * x.shape[0])
    for n in (6, 9, 31):
        x = torch.randn(n, 4)
        torch._dynamo.mark_dynamic(x, 0)
        same(run(x), x.softmax(-1) * n)
    assert len(records()) == 1


def test_changing_sizes_recompile_at_most_once() -> None:
    run = compiled(lambda x: (x - x.mean(0)).relu())
    for n in (4, 7, 9, 30, 1000):
        x = torch.randn(n, 3)
        same(run(x), (x - x.mean(0)).relu())
    assert len(records()) == 2


def test_dynamic_views_cats_and_slices() -> None:
    def f(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        z = torch.cat([x, y.flip(0)], 0)
        return z.reshape(-1, 2), z[1:, ::2], z.t().contiguous() + 1, z[: x.shape[0]].sum(), F.pad(z, (1, 2))

    run = compiled(f, dynamic=True)
    for n, m in ((3, 4), (5, 2), (8, 8)):
        args = torch.randn(n, 4), torch.randn(m, 4)
        same(run(*args), f(*args))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1, 1)])
def test_empty_and_zero_dimensional_tensors(shape: tuple[int, ...]) -> None:
    def f(x: Tensor) -> tuple[Tensor, ...]:
        flat = x.reshape(-1)
        return x * 2 + 1, x.sum(), flat, x.unsqueeze(0).expand(3, *shape), x.mean(), torch.cat([flat, flat])

    check(f, torch.randn(shape, requires_grad=True))


# -- graphs and modes -------------------------------------------------------------------------------
def test_several_graphs_in_one_model() -> None:
    class Broken(Block):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            torch._dynamo.graph_break()
            return super().forward(y.relu())

    check(Broken(), torch.randn(4, 8, requires_grad=True), tolerance=1e-4)
    assert len(records("forward")) == 2


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_without_gradients(mode: Callable[[], Any]) -> None:
    model, x = Block(), torch.randn(4, 8)
    run = compiled(model)
    with mode():
        out, want = run(x), model(x)
        assert not out.requires_grad and out.is_inference() == want.is_inference()
        same(out, want)
    same(run(x), model(x))
    assert run(x).requires_grad


def test_autocast_rounds_where_eager_does() -> None:
    def f(x: Tensor, w: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.gelu(x @ w).softmax(-1)

    args = torch.randn(8, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True)
    out = check(f, *args, tolerance=2e-2)
    assert out.dtype is f(*args).dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check(Block(), torch.randn(4, 8), tolerance=2e-2)


def test_fullgraph_and_training_mode_switches() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU())
    eager = twin(model)
    run = compiled(model, fullgraph=True)
    for training in (True, False, True):
        model.train(training)
        eager.train(training)
        x = torch.randn(6, 4)
        same(run(x), eager(x), tolerance=1e-5)
        same(dict(model.named_buffers()), dict(eager.named_buffers()))


# -- mutation ---------------------------------------------------------------------------------------
def test_batch_norm_updates_its_statistics() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    check(model, torch.randn(2, 3, 6, 6), runs=3, tolerance=1e-5)


def test_inputs_are_mutated() -> None:
    def f(x: Tensor, y: Tensor) -> Tensor:
        x.add_(1)
        y.mul_(x).clamp_(min=0)
        return x * y

    check(f, torch.randn(4, 5), torch.randn(4, 5), runs=2)


def test_views_of_inputs_are_mutated() -> None:
    def f(x: Tensor, y: Tensor) -> Tensor:
        x[1:, ::2].mul_(3)
        x.t()[0].zero_()
        y.view(-1)[3] = 7
        return x.sum() + y.sum()

    check(f, torch.randn(4, 6), torch.randn(2, 3))
    check(f, torch.randn(6, 4).t(), torch.randn(2, 3))


def test_an_input_that_is_not_dense_is_mutated_in_place() -> None:
    base = torch.randn(6, 8)
    mine = base.clone()

    def f(x: Tensor) -> None:
        x.mul_(2).add_(1)

    compiled(f)(mine[::2, 1:5])
    f(base[::2, 1:5])
    same(mine, base)


def test_parameters_and_buffers_are_mutated() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4))
            self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

        def forward(self, x: Tensor) -> Tensor:
            self.steps += 1
            with torch.no_grad():
                self.weight.mul_(0.5)
            return x * self.weight * self.steps

    check(Counting(), torch.randn(3, 4), runs=3)


def test_inputs_that_are_one_tensor_or_overlap() -> None:
    def f(x: Tensor, y: Tensor) -> Tensor:
        x.add_(1)
        return x * y

    x = torch.randn(5)
    y = x.clone()
    same(compiled(f)(x, x), f(y, y))
    same(x, y)
    a = torch.randn(10)
    b = a.clone()
    same(compiled(f)(a[:6], a[4:].view(6)), f(b[:6], b[4:].view(6)))
    same(a, b)


def test_writes_through_one_input_are_read_through_another() -> None:
    def f(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        y.mul_(2)
        return x + z

    a = torch.randn(4, 4)
    b = a.clone()
    z = torch.randn(4)
    same(compiled(f)(a[0], a.view(-1)[:4], z), f(b[0], b.view(-1)[:4], z))
    same(a, b)


# -- outputs ----------------------------------------------------------------------------------------
def test_outputs_alias_as_in_eager() -> None:
    def f(x: Tensor) -> tuple[Tensor, ...]:
        y = x + 1
        return x, x.view(-1), x[1:], y, y.t(), y[0], x.detach(), y

    x = torch.randn(3, 4)
    out = check(f, x)
    assert out[3] is out[7]
    run = compiled(f)
    got = run(x)
    assert got[0] is x and shares(got[1], x) and shares(got[2], x)
    got[4].zero_()
    assert not got[3].any()


def test_an_output_returned_again_is_one_tensor_and_a_view_of_all_of_it_is_another() -> None:
    def f(x: Tensor) -> tuple[Tensor, ...]:
        y = (x + 1).view(-1)
        z = y[1:]
        return y, y.view_as(y), z, z, y

    out = check(f, torch.randn(3, 4))
    assert out[0] is out[4] and out[2] is out[3] and out[0] is not out[1] and shares(out[0], out[1])


def test_views_of_what_is_only_an_index_map_share_memory_when_they_are_returned() -> None:
    check(lambda x: (y := x.flip(0), y.view(-1), y.t()[1:]), torch.randn(3, 4))
    check(lambda x: (x.flip(0).view(-1), x.flip(0)), torch.randn(3, 4))


def test_a_view_of_an_input_returned_is_a_view_of_the_caller_s() -> None:
    x = torch.randn(4, 6, requires_grad=True)
    view = compiled(lambda x: x.t()[1:3])(x)
    assert view._base is x and view.stride() == x.t()[1:3].stride()
    view.sum().backward()
    assert x.grad is not None and x.grad.sum() == 8


def test_a_mutated_input_and_its_view_returned() -> None:
    def f(x: Tensor) -> tuple[Tensor, Tensor]:
        x.mul_(2)
        return x.view(-1), x

    check(f, torch.randn(3, 4))


def test_requires_grad_of_outputs_is_eagers() -> None:
    def f(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return x * 2, w * x, (w > 0), w.detach() * 2, w.argmax(), w * 3

    check(f, torch.randn(4), torch.randn(4, requires_grad=True))


def test_nested_outputs_and_plain_values_pass_through() -> None:
    def f(x: Tensor) -> dict[str, Any]:
        return {"a": [x + 1, None, 3], "b": (x.sum(), {"c": "text", "d": 2.5}), "e": x.shape[0]}

    check(f, torch.randn(4))


STRIDED: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "sum of transposed": lambda x, y: x.transpose(1, 2) + y.transpose(1, 2),
    "transposed and plain": lambda x, y: x.transpose(0, 2) + y.permute(2, 1, 0).contiguous(),
    "broadcast": lambda x, y: x.permute(2, 0, 1) * y[0, 0, 0],
    "broadcast of expanded": lambda x, y: x[:, :1].expand(-1, 5, -1) + y[:1, :1, :1],
    "expanded": lambda x, y: (x[:, :1] * 2).expand(-1, 5, -1),
    "cat": lambda x, y: torch.cat([x.transpose(1, 2), y.transpose(1, 2)], 1),
    "stack": lambda x, y: torch.stack([x.transpose(0, 1), y.transpose(0, 1)], -1),
    "permute": lambda x, y: (x + y).permute(2, 0, 1),
    "reduction": lambda x, y: ((x * y).permute(2, 0, 1).sum(1), x.transpose(1, 2).amax(0, keepdim=True)),
    "slices": lambda x, y: ((x + y)[:, ::2, 1:], (x + y)[..., 0]),
    "where": lambda x, y: torch.where(x.transpose(1, 2) > 0, y.transpose(1, 2), 0.0),
    "clone": lambda x, y: (x.permute(1, 2, 0).clone(), torch.zeros_like(y.permute(2, 1, 0)), x[:, ::2].clone()),
    "matmul": lambda x, y: (x @ y.transpose(1, 2)).transpose(1, 2).relu(),
    "softmax": lambda x, y: x.transpose(1, 2).softmax(-1),
    "cast": lambda x, y: x.permute(2, 0, 1).to(torch.bfloat16),
    "flip": lambda x, y: x.transpose(0, 1).flip(0),
    "chunks": lambda x, y: (x + 1).chunk(2, -1),
    "unfold": lambda x, y: (x + 1).unfold(2, 3, 2),
    "windows that overlap, of what is flipped": lambda x, y: (x.flip(2).unfold(2, 3, 2), y.flip(0).unfold(1, 2, 1)),
    "as strided": lambda x, y: ((x + 1).as_strided((4, 2), (3, 10), 1), x.flip(0).as_strided((5, 3), (2, 1))),
    "diagonal": lambda x, y: (x * y).diagonal(0, 1, 2),
}


@pytest.mark.parametrize("name", STRIDED)
def test_strides_are_eagers(name: str) -> None:
    check(STRIDED[name], torch.randn(4, 5, 6), torch.randn(4, 5, 6))


def test_channels_last_is_kept_through_a_convolution() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 4, 1)).to(
        memory_format=torch.channels_last
    )
    x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last).requires_grad_()
    out = check(model, x, tolerance=1e-5)
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_channels_last_and_plain_memory_mix() -> None:
    def f(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return x + y, y + x, x * 2, torch.cat([x, y], 1), x.mean((2, 3), keepdim=True) * y

    check(f, torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), torch.randn(2, 3, 4, 5))


# -- errors -----------------------------------------------------------------------------------------
def test_an_index_out_of_range_is_an_index_error() -> None:
    run = compiled(lambda i, w: F.embedding(i, w) * 2)
    w = torch.randn(5, 3)
    with pytest.raises(IndexError):
        run(torch.tensor([1, 5]), w)
    same(run(torch.tensor([1, 4]), w), w[[1, 4]] * 2)
    for bad in ([-6], [5]):
        with pytest.raises(IndexError):
            compiled(lambda x, i: x[i] + 1)(w, torch.tensor(bad))


def test_an_integer_division_by_zero_raises_as_eager() -> None:
    run = compiled(lambda x, y: x // y + 1)
    x, y = torch.tensor([4, 6]), torch.tensor([2, 0])
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        x // y
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        run(x, y)
    same(run(x, y + 3), x // (y + 3) + 1)


def test_a_failed_call_mutates_nothing_that_eager_would_not() -> None:
    run = compiled(lambda i, w: F.embedding(i, w).sin().sum())
    w = torch.randn(5, 3, requires_grad=True)
    for _ in range(3):
        with pytest.raises(IndexError):
            run(torch.tensor([9]), w)
        out = run(torch.tensor([2, 2]), w)
        out.backward()
    torch.testing.assert_close(w.grad[2], 6 * w.detach()[2].cos())


def test_a_function_that_does_nothing() -> None:
    check(lambda x: x, torch.randn(3))
    check(lambda x: (x, 3, None), torch.randn(3))
    check(lambda x: torch.zeros(3) + 1, torch.randn(3))
    check(lambda x: None, torch.randn(3))


def test_one_kernel_for_a_chain_and_none_goes_to_aten() -> None:
    check(lambda x: ((x.sin() + 1) * x).softmax(-1), torch.randn(8, 16))
    assert kernels() == 1
    assert externs() == []


# -- what a call costs ------------------------------------------------------------------------------
def host(name: str) -> str:
    return next(r for r in RECORDS if r.name.endswith(name)).stages["program"].source


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_call_takes_no_arena_and_asks_no_threads_that_it_has_no_work_for(dynamic: bool) -> None:
    torch._dynamo.reset()
    RECORDS.clear()
    run = torch.compile(lambda x: x.sin() + 1, backend="minifuse", dynamic=dynamic)
    for n in (1 << 8, 1 << 20, 1 << 8):
        x = torch.randn(n)
        torch.testing.assert_close(run(x), x.sin() + 1)
    texts = [r.stages["program"].source for r in RECORDS]
    assert len(texts) == (1 if dynamic else 2)
    assert "frame.sizes, 1)" in texts[0]
    if dynamic:
        assert texts[0].count("if 4*sym_") == 1 and "make0 = empty if" in texts[0]
    else:
        assert "empty(" in texts[0] and "new(" in texts[1] and "frame.sizes, threads())" in texts[1]


def test_a_graph_without_a_kernel_enters_no_frame() -> None:
    torch._dynamo.reset()
    RECORDS.clear()
    x = torch.randn(16, requires_grad=True)
    torch.compile(lambda x: x + 1, backend="minifuse")(x).sum().backward()
    assert torch.equal(x.grad, torch.ones(16))
    assert "enter" in host("_forward") and "enter" not in host("_backward")


def test_calls_at_once_without_an_arena_have_frames_of_their_own() -> None:
    torch._dynamo.reset()
    run = torch.compile(lambda x, y: x * 2 + y, backend="minifuse")
    xs = [torch.full((64,), float(k)) for k in range(8)]
    run(xs[0], xs[0])

    def many(x: torch.Tensor) -> bool:
        return all(torch.equal(run(x, x), x * 3) for _ in range(200))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(many, xs))


@pytest.mark.parametrize("default", ["meta", "cpu"])
def test_a_default_device_is_the_callers_alone(default: str) -> None:
    """What the compiler and the program make for themselves is where they need it."""
    torch._dynamo.reset()
    x, w = torch.randn(9, 16), torch.randn(16, 8)

    def f(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(F.gelu(x @ w).half().float() * 1e-3, (8,)).softmax(-1)

    expected = f(x, w)
    with torch.device(default):
        found = torch.compile(f, backend="minifuse")(x, w)
    torch.testing.assert_close(found, expected)


def test_nothing_is_imported_that_is_not_used() -> None:
    script = """
import sys
import minifuse
assert "torch" not in sys.modules, "torch"
assert set(minifuse.__all__) <= set(dir(minifuse))
import torch
torch.compile(lambda x: x.sin() + 1, backend="minifuse")(torch.randn(5))
for name in ("rich.table", "jinja2", "scipy", "minifuse.cli"):
    assert name not in sys.modules, name
import minifuse.capturing
assert minifuse.capture(lambda x: x + 1, torch.randn(3)).stages and str(minifuse.reports()[0])
assert all(getattr(minifuse, name) is not None for name in minifuse.__all__)
try:
    minifuse.nothing
except AttributeError as why:
    assert "nothing" in str(why)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
