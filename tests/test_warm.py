"""Warm starts: a graph that an earlier process compiled is taken from the disk, and is the same to the bit."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import nn

import minifuse
from minifuse import compat
from minifuse import warm as warm_start
from minifuse.ir.ops import TABLE
from minifuse.passes import pipeline
from minifuse.passes.fuse import forbid
from minifuse.remat import Problem, RematPlan, resolve
from minifuse.runtime.loading import disk_cache

pytestmark = pytest.mark.skipif(not compat.CACHES, reason="AOT autograd's cache takes a compiler since torch 2.13")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)
        self.drop = nn.Dropout(0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.drop(self.down(torch.nn.functional.gelu(self.up(self.norm(x)))))


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[str]:
    yield str(tmp_path / "cache")
    disk_cache.cache_clear()


def entries(folder: str) -> list[Path]:
    return sorted(Path(folder).glob("graph_*.bin"))


def step(folder: str, rows: int = 8, model: Callable[[], nn.Module] = Block, **options: Any) -> list[torch.Tensor]:
    """A training step compiled anew, from seeds: result and gradients. `warm` in the last report says how."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    made = model()
    x = torch.randn(rows, 32, requires_grad=True)
    given = {"plan_cache": True, "cache_dir": folder, **options}
    out = torch.compile(made, backend="minifuse", options=given)(x)
    out.square().sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in made.parameters())]  # type: ignore[list-item]


def warm() -> list[bool]:
    return [r.record.warm for r in minifuse.reports()[-2:]]


def same(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_a_training_step_is_taken_from_the_disk_and_is_the_same_to_the_bit(folder: str) -> None:
    first = step(folder)
    assert warm() == [False, False] and len(entries(folder)) == 1
    before = minifuse.reports()[-2:]
    same(step(folder), first)
    assert warm() == [True, True]
    for old, new in zip(before, minifuse.reports()[-2:], strict=True):
        assert old.name != new.name and "read from the cache" in str(new) and "fuse" not in new.seconds
        assert [str(d) for d in old.decisions] == [str(d) for d in new.decisions]
        assert {**old.to_json(), "name": "", "seconds": 0} == {**new.to_json(), "name": "", "seconds": 0}


def here(x: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
    return x[i].sin().sum(0) * 2


def there(x: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
    # fmt: off
    return (x[i].sin()
            .sum(0) * 2)
    # fmt: on


def test_a_graph_from_the_disk_has_the_lines_of_who_asks(folder: str) -> None:
    x, i = torch.randn(6, 4), torch.tensor([1, 2])
    reports = []
    for fn, line in ((here, 1), (there, 2)):
        torch._dynamo.reset()
        run = torch.compile(fn, backend="minifuse", options={"plan_cache": True, "cache_dir": folder})
        torch.testing.assert_close(run(x, i), fn(x, i))
        reports.append(minifuse.reports()[-1])
        place = rf"\(test_warm.py:{fn.__code__.co_firstlineno + line}\)"
        with pytest.raises(IndexError, match=place):
            run(x, torch.tensor([1, 7]))
    assert [r.record.warm for r in reports] == [False, True]
    first, second = (set(r.record.stages["memory"].origins.values()) for r in reports)
    assert first == {f"test_warm.py:{here.__code__.co_firstlineno + 1} return x[i].sin().sum(0) * 2"}
    assert {line.partition(" ")[2] for line in second} == {"return (x[i].sin()"}
    assert f"test_warm.py:{here.__code__.co_firstlineno + 1}" not in str(reports[1].to_json())


def before(x: torch.Tensor) -> torch.Tensor:
    total = x.exp().sum(-1)
    return (x.sin() @ x).sum(-1) + total


def behind(x: torch.Tensor) -> torch.Tensor:
    total = x.exp().sum(-1)
    return (x.sin() @ x).sum(-1) + total


def test_a_decision_about_two_lines_has_both_of_who_asks(folder: str) -> None:
    x, said = torch.randn(32, 32), []
    for fn in (before, behind):
        torch._dynamo.reset()
        torch.compile(fn, backend="minifuse", options={"plan_cache": True, "cache_dir": folder})(x)
        said.append([d.where for d in minifuse.reports()[-1].decisions])
    assert [r.record.warm for r in minifuse.reports()[-2:]] == [False, True]
    first, second = (fn.__code__.co_firstlineno for fn in (before, behind))
    assert any(where.count("test_warm.py:") == 2 for where in said[0])
    assert said[1] == [where.replace(f":{first + 1} ", f":{second + 1} ").replace(f":{first + 2} ", f":{second + 2} ")
                       for where in said[0]]  # fmt: skip


def test_another_process_compiles_nothing(folder: str) -> None:
    text = f"""
        import torch, minifuse
        from minifuse.runtime import toolchain
        def refuse(*args, **kw):
            raise AssertionError("the C compiler was asked")
        torch.manual_seed(0)
        model, x = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.GELU()), torch.randn(4, 16)
        for k in range(2):
            torch._dynamo.reset()
            out = torch.compile(model, backend="minifuse", options={{"cache_dir": {folder!r}}})(x)
            out.sum().backward()
            toolchain.Compiling = refuse
        print(out.sum().item(), [r.record.warm for r in minifuse.reports()])
    """
    clean = {k: v for k, v in os.environ.items() if k != "MINIFUSE_PLAN_CACHE"}
    said = [subprocess.run([sys.executable, "-c", textwrap.dedent(text)], capture_output=True, text=True, env=clean,
                           check=True).stdout for _ in range(2)]  # fmt: skip
    assert said[0].split()[1:] == "[False, False, True, True]".split()
    assert said[1].split()[1:] == "[True, True, True, True]".split()
    assert said[0].split()[0] == said[1].split()[0]


def test_one_dynamic_graph_serves_its_sizes_and_a_guard_keeps_the_others_out(folder: str) -> None:
    def run(*rows: int) -> list[torch.Tensor]:
        torch._dynamo.reset()
        fn = torch.compile(lambda x: x.softmax(0) * (2 if x.shape[0] > 20 else 3), backend="minifuse", dynamic=True,
                           options={"plan_cache": True, "cache_dir": folder})  # fmt: skip
        return [fn(torch.arange(n * 4.0).reshape(n, 4)) for n in rows]

    cold = run(8, 9, 30)
    assert not minifuse.reports()[-1].record.warm
    same(run(8, 9, 30), cold)
    assert minifuse.reports()[-1].record.warm and minifuse.reports()[-2].record.warm
    same(run(31, 10), [x.softmax(0) * k for x, k in ((torch.arange(124.0).reshape(31, 4), 2),
                                                    (torch.arange(40.0).reshape(10, 4), 3))])  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {"fusion_fuel": 1},
        {"precise": True},
        {"remat": "save_all"},
        {"device_model": "A100"},
        {"widen": True},
        {"rng": "eager"},
    ],
)
def test_what_was_compiled_otherwise_is_not_taken(folder: str, options: dict[str, Any]) -> None:
    step(folder)
    step(folder, **options)
    assert warm() == [False, False] and len(entries(folder)) == 2


class KeepAll:
    name = "keep_all"

    def plan(self, problem: Problem) -> RematPlan:
        return resolve("save_all").plan(problem)


@pytest.mark.parametrize(
    "options",
    [
        {"plan_cache": False},
        {"fusion_rules": [forbid("aten.exp*")]},
        {"remat": KeepAll()},
        {"fallback": "warn"},
        {"target": "interpret"},
    ],
)
def test_what_no_key_can_name_is_not_kept(folder: str, options: dict[str, Any]) -> None:
    step(folder)
    step(folder, **options)
    assert warm() == [False, False] and len(entries(folder)) == 1


def test_a_pass_or_an_operator_of_the_users_own_keeps_graphs_off_the_disk(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    step(folder)
    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "PASSES", (*pipeline.PASSES, pipeline.Pass("idle", lambda plan, ctx: plan)))
        step(folder)
        assert warm() == [False, False]
    with monkeypatch.context() as patched:
        patched.setitem(TABLE, "exp", TABLE["exp2"])
        torch._dynamo.reset()
        torch.compile(torch.exp, backend="minifuse", options={"plan_cache": True, "cache_dir": folder})(torch.ones(3))
    step(folder)
    assert warm() == [True, True] and len(entries(folder)) == 1


@torch.library.custom_op("warm::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2


twice.register_fake(torch.empty_like)


def test_what_a_custom_operator_does_is_not_in_the_graph(folder: str) -> None:
    options = {"plan_cache": True, "cache_dir": folder}
    for factor in (2, 5):
        twice.register_autograd(lambda ctx, g, factor=factor: g * factor)
        torch._dynamo.reset()
        x = torch.ones(4, requires_grad=True)
        torch.compile(lambda x: twice(x).sin(), backend="minifuse", options=options)(x).sum().backward()
        torch.testing.assert_close(x.grad, torch.full((4,), 2.0).cos() * factor)
    assert not entries(folder)


def grads(run: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
    """Two backwards through one forward, and a forward that nobody differentiates."""
    x = torch.linspace(-2, 2, 24).reshape(4, 6).requires_grad_()
    out = run(x)
    (first,) = torch.autograd.grad(out.sum(), x, retain_graph=True)
    (second,) = torch.autograd.grad((out * out).sum(), x)
    return [out.detach(), first, second, run(x.detach()), run(x).detach()]


SCALE = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: (x.sin() * x.exp()).softmax(1),
        lambda x: x.sin() * SCALE + torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.5]),
        lambda x: torch.utils.checkpoint.checkpoint(lambda x: x.sin().exp() * x, x, use_reentrant=False),
        lambda x: x.t().sin().unsqueeze(0)[0] * 2,
        lambda x: x.clone().mul_(2).add_(x),
        lambda x: torch.nn.functional.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None]),
    ],
)
def test_gradients_of_a_warm_start_are_the_cold_ones(fn: Callable[..., torch.Tensor], folder: str) -> None:
    found = []
    for _ in range(2):
        torch._dynamo.reset()
        found.append(grads(torch.compile(fn, backend="minifuse", options={"plan_cache": True, "cache_dir": folder})))
    same(found[1], found[0])
    torch.testing.assert_close(found[0], grads(fn), rtol=1e-4, atol=1e-5)


def test_a_view_of_an_input_and_a_mutated_one_are_eagers(folder: str) -> None:
    def fn(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y.add_(1)
        return x[1:].t(), (x * y).sum(0)

    for _ in range(2):
        torch._dynamo.reset()
        x, y = torch.arange(12.0).reshape(4, 3), torch.ones(4, 3)
        run = torch.compile(fn, backend="minifuse", options={"plan_cache": True, "cache_dir": folder})
        view, total = run(x, y)
        assert view.data_ptr() == x[1:].data_ptr() and torch.equal(y, torch.full((4, 3), 2.0))
        assert torch.equal(view, x[1:].t()) and torch.equal(total, (x * 2).sum(0))
    assert minifuse.reports()[-1].record.warm


def test_random_numbers_are_drawn_anew_from_the_seed(folder: str) -> None:
    drawn = []
    for _ in range(2):
        torch._dynamo.reset()
        torch.manual_seed(3)
        run = torch.compile(lambda x: torch.nn.functional.dropout(x, 0.5), backend="minifuse",
                            options={"plan_cache": True, "cache_dir": folder})  # fmt: skip
        drawn += [run(torch.ones(64)), run(torch.ones(64))]
    assert torch.equal(drawn[0], drawn[2]) and torch.equal(drawn[1], drawn[3]) and not torch.equal(drawn[0], drawn[1])
    assert minifuse.reports()[-1].record.warm


def test_of_the_variants_of_a_key_a_lost_one_is_written_again(folder: str) -> None:
    def run(n: int) -> None:
        torch._dynamo.reset()
        fn = torch.compile(lambda x: x.exp() * (2 if x.shape[0] > 20 else 3), backend="minifuse", dynamic=True,
                           options={"plan_cache": True, "cache_dir": folder})  # fmt: skip
        torch.testing.assert_close(fn(torch.zeros(n, 4)), torch.full((n, 4), 2.0 if n > 20 else 3.0))

    for n in (8, 30):
        run(n)
    before = entries(folder)
    for lost in before:
        lost.unlink()
        for n in (8, 30):
            run(n)
        assert [p.stem.rpartition("-")[0] for p in entries(folder)] == [p.stem.rpartition("-")[0] for p in before]


def test_one_compile_inside_another_leaves_torchs_cache_as_it_was() -> None:
    def state() -> list[Any]:
        return [vars(owner).get(name) for owner, name in compat._HOOKS]

    before = state()
    with compat.caching("a", lambda key: [], lambda key, data: None, warm_start.describe):
        outer = state()
        with compat.caching("b", lambda key: [], lambda key, data: None, warm_start.describe):
            assert state() != outer
        assert state() == outer
    assert state() == before


def test_a_dump_is_written_each_time(folder: str, tmp_path: Path) -> None:
    for k in range(2):
        step(folder, debug_dir=str(tmp_path / str(k)))
        assert any((tmp_path / str(k)).rglob("decisions.json"))


def test_a_damaged_entry_is_a_miss(folder: str) -> None:
    """Cut at every tenth part, or one bit turned at as many places."""
    first = step(folder)
    (entry,) = entries(folder)
    whole = entry.read_bytes()
    for k in range(0, len(whole), len(whole) // 9):
        turned = bytearray(whole)
        turned[k] ^= 4
        for damaged in (whole[:k], bytes(turned)):
            entry.write_bytes(damaged)
            assert [*disk_cache(folder).having("graph_")] == [entry]
            assert disk_cache(folder).read(entry) is None and not entry.exists()
    entry.write_bytes(whole[: len(whole) // 2])
    same(step(folder), first)
    assert warm() == [False, False]
    same(step(folder), first)
    assert warm() == [True, True]


def test_an_entry_cut_at_any_tenth_byte_is_a_miss(folder: str) -> None:
    """Of both kinds: a graph, and the library of its kernels."""
    options = {"plan_cache": True, "cache_dir": folder}
    torch._dynamo.reset()
    x = torch.randn(64)
    want = torch.compile(torch.sigmoid, backend="minifuse", options=options)(x)
    cache = disk_cache(folder)
    kept = {path: path.read_bytes() for path in Path(folder).glob("*.bin")}
    assert len(kept) >= 2
    for path, whole in kept.items():
        path.unlink()  # this process runs the library from that file
        for length in range(0, len(whole), 10):
            path.write_bytes(whole[:length])
            assert cache.read(path) is None and not path.exists()
        path.write_bytes(whole[: len(whole) // 10 * 9])
    minifuse.runtime.loading._loaded.clear()  # type: ignore[attr-defined]
    torch._dynamo.reset()
    assert torch.equal(torch.compile(torch.sigmoid, backend="minifuse", options=options)(x), want)
    assert not minifuse.reports()[-1].record.warm


def test_a_kernel_that_is_gone_is_compiled_again(folder: str) -> None:
    first = step(folder)
    for path in Path(folder).glob("*.bin"):
        if not path.name.startswith("graph_"):
            path.unlink()
    minifuse.runtime.loading._loaded.clear()  # type: ignore[attr-defined]
    same(step(folder), first)
    assert warm() == [True, True]


def test_a_directory_that_others_may_write_to_is_not_read(folder: str) -> None:
    first = step(folder)
    Path(folder).chmod(0o777)
    disk_cache.cache_clear()
    with pytest.warns(UserWarning, match="others may write"):
        same(step(folder), first)
    assert warm() == [False, False]


def test_processes_that_start_together_leave_one_compile_of_files(folder: str) -> None:
    text = f"""
        import torch, minifuse
        torch.manual_seed(0)
        model, x = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.GELU()), torch.randn(4, 16)
        out = torch.compile(model, backend="minifuse", options={{"cache_dir": {folder!r}}})(x)
        out.sum().backward()
        print(out.sum().item())
    """
    clean = {k: v for k, v in os.environ.items() if k not in ("MINIFUSE_PLAN_CACHE", "MINIFUSE_DEVICE_MODEL")}
    command = [sys.executable, "-c", textwrap.dedent(text)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=clean) for _ in range(10)]
    said = {one.communicate()[0] for one in running}
    assert len(said) == 1 and all(one.returncode == 0 for one in running)
    kinds = [path.name.partition("_")[0] for path in Path(folder).glob("*.bin")]
    named = sorted(k for k in kinds if k in ("graph", "device", "products"))
    assert named == ["device", "graph", "products"] and len(kinds) == 5
