"""Programs on a GPU: what eager gives, on the right stream and device, over PyTorch's own memory."""

from __future__ import annotations

import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minifuse.ir import prims
from minifuse.ir.interpret import philox
from minifuse.records import RECORDS
from tests.remat.test_offload import large_to_host

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device"),
]


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    RECORDS.clear()
    torch.manual_seed(0)


def compiled(function: Callable[..., Any], dynamic: bool = False, **options: Any) -> Any:
    return torch.compile(
        function, backend="minifuse", dynamic=dynamic, options={"verify": True, "device_model": "auto", **options}
    )


def randn(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype, requires_grad=grad)


def interpreted() -> list[str]:
    return [str(d) for r in RECORDS for d in r.decisions if d.rule == "interpreted"]


def close(found: Any, expected: Any, dtype: torch.dtype = torch.float32) -> None:
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12}.get(dtype, 2e-2)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert not interpreted()


FUNCTIONS: dict[str, Callable[[Tensor], Any]] = {
    "pointwise": lambda x: (F.gelu(x * 2 + 1), x.tanh(), x > 0, x.abs().sqrt()),
    "rows": lambda x: (x.softmax(-1), x.sum(1), x.amax(1), x.argmax(1)),
    "columns": lambda x: (x.sum(0), x.mean(), x.var(0), x.amin(0)),
    "views": lambda x: (x.t() + 1, torch.cat([x, x * 2], 1), F.pad(x, (1, 2)), x.flip(0)),
    "norms": lambda x: (F.layer_norm(x, (x.shape[-1],)), F.rms_norm(x, (x.shape[-1],))),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_kernels_give_what_eager_gives(name: str, dtype: torch.dtype) -> None:
    x = randn(300, 1000, dtype=dtype)
    close(compiled(FUNCTIONS[name])(x), FUNCTIONS[name](x), dtype)


@pytest.mark.parametrize("n", [1, 7, 1024, 5000, 16_384, 20_000, 50_000, 131_072])
def test_rows_of_every_length(n: int) -> None:
    x = randn(33, n)
    softmax, total = compiled(lambda x: (x.softmax(-1), x.sum(-1)))(x)
    close(softmax, x.softmax(-1))
    torch.testing.assert_close(total.double(), x.double().sum(-1), rtol=0, atol=1e-6 * n**0.5)


def test_integers_and_bools() -> None:
    x, y = torch.randint(-99, 99, (500,), device="cuda"), torch.randint(1, 9, (500,), device="cuda")

    def f(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return x // y, x % y, x << 2, ~x, (x > y) & (y > 3), (x > 90).any()

    close(compiled(f)(x, y), f(x, y))


def test_sizes_that_change_take_one_program() -> None:
    f = compiled(lambda x: ((x * 2).softmax(-1), x.sum(0)), dynamic=True)
    for shape in ((64, 128), (65, 129), (300, 2000), (16, 4096)):
        x = randn(*shape)
        close(f(x), ((x * 2).softmax(-1), x.sum(0)))
    assert len(RECORDS) <= 2


def test_misaligned_inputs() -> None:
    x = randn(4097)[1:]
    close(compiled(lambda x: x * 2 + 1)(x), x * 2 + 1)


def test_a_block_trains() -> None:
    block = nn.Sequential(nn.LayerNorm(256), nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)).cuda()
    x = randn(700, 256)

    def gradients(model: Callable[[Tensor], Tensor]) -> list[Tensor]:
        block.zero_grad()
        (model(x) * x.sin()).mean().backward()
        return [p.grad.clone() for p in block.parameters() if p.grad is not None]

    torch.backends.cuda.matmul.allow_tf32 = False
    close(gradients(compiled(block)), gradients(block))


def test_fusion_changes_no_bit() -> None:
    x, w = randn(2000, 1000, grad=True), randn(1000, grad=True)

    def f(x: Tensor, w: Tensor) -> Tensor:
        return F.dropout(F.gelu(F.rms_norm(x + x.roll(1, 0), (1000,), w)), 0.2).softmax(-1)

    def run(**options: Any) -> list[Tensor]:
        torch._dynamo.reset()
        torch.manual_seed(3)
        y = compiled(f, **options)(x, w)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), (x, w))]

    for a, b in zip(run(), run(fusion_fuel=0), strict=True):
        assert torch.equal(a, b)


def test_random_numbers_are_the_same_at_every_run() -> None:
    def mask(x: Tensor) -> Tensor:
        return F.dropout(x, 0.5) != 0

    f = compiled(mask)
    x = torch.ones(10_000, device="cuda")
    torch.manual_seed(5)
    first = f(x)
    torch.manual_seed(5)
    assert torch.equal(first, f(x))
    assert 0.45 < first.float().mean() < 0.55


def test_work_is_queued_on_the_current_stream() -> None:
    f = compiled(lambda x: x * 2 + 1)
    x = randn(1 << 22)
    f(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        y = x
        for _ in range(20):
            y = f(y)
    stream.synchronize()
    expected = x
    for _ in range(20):
        expected = expected * 2 + 1
    close(y, expected)


def test_an_index_out_of_range_raises_at_a_later_call() -> None:
    f = compiled(lambda table, at: F.embedding(at, table) * 2)
    table = randn(5, 8)
    f(table, torch.tensor([5], device="cuda"))
    torch.cuda.synchronize()
    with pytest.raises(IndexError, match="index out of range"):
        f(table, torch.tensor([0], device="cuda"))
    close(f(table, torch.tensor([4], device="cuda")), table[4:] * 2)


def test_memory_returns_to_the_allocator() -> None:
    f = compiled(lambda x: (x @ x).softmax(-1) @ x)
    x = randn(512, 512)
    f(x)
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(5):
        f(x)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one device")
def test_the_second_device() -> None:
    x = torch.randn(1000, 100, device="cuda:1")
    f = compiled(lambda x: x.softmax(-1) + 1)
    close(f(x), x.softmax(-1) + 1)
    with torch.cuda.device(1):
        close(f(x), x.softmax(-1) + 1)
    stream = torch.cuda.Stream(1)
    stream.wait_stream(torch.cuda.current_stream(1))
    with torch.cuda.stream(stream):
        y = f(x)
    stream.synchronize()
    close(y, x.softmax(-1) + 1)
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("shape", [(33, 1000), (4, 40_000), (2000, 7), (4, 1), (4, 0)], ids=str)
def test_scans(shape: tuple[int, int]) -> None:
    x = randn(*shape, dtype=torch.float64)

    def f(x: Tensor) -> tuple[Tensor, ...]:
        return x.cumsum(1) * 2, x.cumsum(0).relu(), *x.cummax(1), *x.cummin(0), (x > 0).cumsum(1)

    close(compiled(f)(x), f(x), torch.float64)
    n = x.float()
    for a, b in zip(compiled(f)(n), compiled(f, fusion_fuel=0)(n), strict=True):
        assert torch.equal(a, b)


def test_random_bits_are_philoxs() -> None:
    seed = torch.tensor(123456789012345, device="cuda")

    def f(seed: Tensor) -> Tensor:
        return prims.random([3, 500], seed, 7, "uniform", 0, 0, torch.float32, seed.device) + 0

    expected = philox("uniform", 123456789012345, 7, torch.arange(1500).view(3, 500))
    assert torch.equal(compiled(f)(seed).cpu(), expected)


def test_numbers_of_the_host_and_tensors_of_both_devices() -> None:
    x, k, h = randn(300, 100), torch.tensor(1.5, dtype=torch.float64), torch.randn(100)

    def f(x: Tensor, k: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        return x * k + h[3], h.sin() + k, x + h.to("cuda") * 2, x.sum(0).cpu() + h

    run = compiled(f)
    for number in (1.5, -2.0):
        k.fill_(number)
        found = run(x, k, h)
        torch.testing.assert_close(found, f(x, k, h), rtol=1e-5, atol=1e-4)


def test_pinned_inputs() -> None:
    h = torch.randn(1000).pin_memory()
    f = compiled(lambda h: (h.to("cuda", non_blocking=True) * 2).sin())
    close(f(h), (h.to("cuda") * 2).sin())
    k = torch.tensor(3.0).pin_memory()
    x = randn(1 << 20)
    g = compiled(lambda x, k: x * k)
    y = g(x, k)
    k.fill_(0.0)  # the host writes before the device may have read
    close(y, x * 3)


def test_an_optimiser_is_a_batch_over_its_tensors() -> None:
    shapes = [(257, 33), (33,), (1,), (1 << 18,), (7, 11, 13)]
    ps, gs, ms = ([randn(*s) for s in shapes] for _ in range(3))
    gs[3] = randn((1 << 18) + 1)[1:]  # not on 16 bytes

    def step(ps: list[Tensor], gs: list[Tensor], ms: list[Tensor]) -> None:
        torch._foreach_mul_(ms, 0.9)
        torch._foreach_add_(ms, gs, alpha=0.1)
        torch._foreach_addcdiv_(ps, ms, torch._foreach_add(torch._foreach_abs(gs), 1e-3), value=-1e-2)

    expected = [[t.clone() for t in ts] for ts in (ps, ms)]
    run = compiled(step)
    for _ in range(3):
        run(ps, gs, ms)
        step(expected[0], gs, expected[1])
    close([ps, ms], expected)


@pytest.mark.parametrize("causal", [True, False])
def test_attention_of_half_types_trains(causal: bool) -> None:
    q, k, v = (randn(2, 4, 256, 64, dtype=torch.bfloat16, grad=True) for _ in range(3))

    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.gelu(F.scaled_dot_product_attention(q * 0.5, k, v, is_causal=causal)).float().square().mean()

    run = compiled(f)
    close(torch.autograd.grad(run(q, k, v), (q, k, v)), torch.autograd.grad(f(q, k, v), (q, k, v)), torch.bfloat16)


def test_convolutions_and_norms_of_channels_last_train() -> None:
    net = nn.Sequential(nn.Conv2d(8, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
                        nn.Conv2d(32, 16, 1), nn.GroupNorm(4, 16), nn.SiLU()).cuda()  # fmt: skip
    torch.backends.cudnn.allow_tf32 = False
    x = randn(8, 8, 32, 32).to(memory_format=torch.channels_last)

    def gradients(model: Callable[[Tensor], Tensor]) -> list[Tensor]:
        net.zero_grad()
        (model(x).square()).mean().backward()
        return [p.grad.clone() for p in net.parameters() if p.grad is not None]

    for found, expected in zip(gradients(compiled(net)), gradients(net), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_calls_take_what_they_are_given() -> None:
    """The first call of a variant goes through Triton's launcher, the next ones through a table."""
    f = compiled(lambda x, y: ((x * 2 + y) @ y, (x - y).sum(1), (x * y).softmax(0)))
    for k in range(6):
        flat = [randn(128 * 128 + 1)[k % 2 : 128 * 128 + k % 2] for _ in range(2)]  # every other call off 16 bytes
        x, y = (t.view(128, 128) for t in flat)
        expected = (x * 2 + y) @ y, (x - y).sum(1), (x * y).softmax(0)
        torch.testing.assert_close(f(x, y), expected, rtol=1e-4, atol=1e-3)


def test_threads_call_one_program() -> None:
    f = compiled(lambda x: (x * 2 + 1).softmax(-1))
    xs = [randn(64, 1000) for _ in range(8)]

    def call(x: Tensor) -> Tensor:
        for _ in range(20):
            y = f(x)
        torch.cuda.synchronize()
        return y

    f(xs[0])
    with ThreadPoolExecutor(4) as pool:
        for y, x in zip(pool.map(call, xs), xs, strict=True):
            close(y, (x * 2 + 1).softmax(-1))


@pytest.mark.parametrize("words", [1000, 1003])
def test_a_vocabulary_of_any_size_trains(words: int) -> None:
    """Rows of the logits and of their gradient begin on 16 bytes, whatever their length; the caller sees eager's."""
    h, w = randn(512, 64, dtype=torch.bfloat16, grad=True), randn(words, 64, dtype=torch.bfloat16, grad=True)
    labels = torch.randint(0, words, (512,), device="cuda")

    def f(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        logits = h @ w.t()
        return logits, F.cross_entropy(logits.float(), labels)

    run = compiled(f)
    found, expected = run(h, w), f(h, w)
    assert found[0].stride() == expected[0].stride()
    close(found, expected, torch.bfloat16)
    close(torch.autograd.grad(found[1], (h, w)), torch.autograd.grad(expected[1], (h, w)), torch.bfloat16)


def test_running_statistics_of_a_batch_norm() -> None:
    x = randn(32, 8, 56, 56)
    mean, var = randn(8), randn(8).abs()

    def f(x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        return F.batch_norm(x, mean, var, None, None, True) + mean.view(1, -1, 1, 1)

    mine, eagers = (mean.clone(), var.clone()), (mean.clone(), var.clone())
    torch.testing.assert_close(compiled(f)(x, *mine), f(x, *eagers), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mine, eagers, rtol=1e-4, atol=1e-4)


def test_what_the_host_keeps_comes_back_as_it_went() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(m for _ in range(4) for m in (nn.Linear(512, 2048), nn.GELU(), nn.Linear(2048, 512)))
    ).cuda()
    x = torch.randn(4096, 512, device="cuda")

    def step(policy: object) -> tuple[list[Tensor], int]:
        torch._dynamo.reset()
        run = torch.compile(model, backend="minifuse", options={"remat": policy})
        for _ in range(3):
            model.zero_grad()
            torch.cuda.reset_peak_memory_stats()
            run(x).square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None], torch.cuda.max_memory_allocated()

    (want, most), (found, least) = step("save_all"), step(large_to_host)
    assert all(map(torch.equal, want, found)) and least < 0.8 * most


def test_random_numbers_beside_sums_of_odd_rows() -> None:
    seed = torch.tensor(77, device="cuda")

    def f(x: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
        drawn = prims.random([6, 501], seed, 7, "uniform", 0, 0, torch.float32, seed.device)
        return drawn * x, (drawn * x).sum(1)

    expected = philox("uniform", 77, 7, torch.arange(6 * 501).view(6, 501))
    assert torch.equal(compiled(f)(randn(6, 501) * 0 + 1, seed)[0].cpu(), expected)


# Last, for they take the longest.
@pytest.mark.parametrize("family", ["gpt2", "llama", "t5", "convnext"])
def test_a_training_step_is_as_exact_as_eager(family: str) -> None:
    exact = pytest.importorskip("tests.kernels.run").exact
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    assert exact(family, "cuda", draws=2) == []


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(256), nn.Linear(256, 512), nn.Linear(512, 256)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


def _trained(mode: str, sizes: tuple[int, ...]) -> list[Tensor]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = _Block().cuda()
    optimiser = torch.optim.SGD(model.parameters(), 0.01)
    run = torch.compile(model, backend="minifuse", mode=mode, dynamic=False)
    found = []
    for n in sizes:
        torch.compiler.cudagraph_mark_step_begin()
        optimiser.zero_grad()
        loss = run(torch.ones(n, 256, device="cuda")).square().mean()
        loss.backward()
        optimiser.step()
        found.append(loss.detach().clone())
    return [*found, *(p.detach().clone() for p in model.parameters())]


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"])
def test_every_mode_trains_to_the_same_bits(mode: str) -> None:
    sizes = (64, 64, 64, 64, 32, 32, 32, 64)
    for found, want in zip(_trained(mode, sizes), _trained("default", sizes), strict=True):
        assert torch.equal(found, want)


def test_a_recording_draws_anew_at_each_replay_and_writes_to_its_inputs() -> None:
    counter = torch.zeros(1024, device="cuda")

    def drop(x: Tensor) -> Tensor:
        counter.add_(1)
        return F.dropout(x, 0.5)

    run = torch.compile(drop, backend="minifuse", mode="reduce-overhead")
    x = torch.ones(1024, device="cuda")
    masks = []
    for _ in range(6):
        torch.compiler.cudagraph_mark_step_begin()
        masks.append(run(x).clone())
    assert all(not torch.equal(a, b) for k, a in enumerate(masks) for b in masks[:k])
    assert torch.equal(counter, torch.full_like(counter, 6))


def test_timed_schedules_are_kept() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        return F.silu(x) * y

    x, y = randn(4096, 4096), randn(4096, 4096)
    found = []
    for _ in range(2):
        torch._dynamo.reset()
        RECORDS.clear()
        close(torch.compile(function, backend="minifuse", mode="max-autotune-no-cudagraphs")(x, y), function(x, y))
        found.append([d.words for r in RECORDS for d in r.decisions if d.rule == "autotune"])
    assert found[0] == found[1] != []  # the second compile took what the first had timed
