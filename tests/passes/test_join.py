"""Joins in place: pieces that their producers store where the joined buffer has them, and when they are not."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minifuse.ir.decision import Decision
from minifuse.ir.index import as_expr
from minifuse.ir.plan import Extern, Free, Join, Launch, Plan
from minifuse.ir.text import print_plan
from minifuse.ir.verify import VerificationError, verify_plan
from minifuse.passes import join
from minifuse.passes.fuse.log import JOINED
from minifuse.passes.memory import arena_intervals
from tests.judge import check, compiled, externs, kernels, outcomes_in_triton, records, same

aten = torch.ops.aten
ROOT = Path(__file__).resolve().parents[2]
X, W, V = torch.randn(6, 16, 32), torch.randn(32, 48), torch.randn(32, 16)


def decisions() -> list[Decision]:
    return [d for r in records() for d in r.decisions if d.rule == JOINED]


def joins(plan: Plan) -> list[Join]:
    return [s for s in plan.steps if isinstance(s, Join)]


def final() -> Plan:
    return records()[0].stages["memory"]


@pytest.fixture
def every(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every join that can be is taken, whatever it is worth."""
    monkeypatch.setattr(join.Trial, "choose", take_all)


def take_all(self: join.Trial, fuel: int | None) -> frozenset[join.Candidate]:
    taken = frozenset(self.able if fuel is None else self.able[:fuel])
    self.fuse(taken)
    return taken


# -- what is written, and what it moves ---------------------------------------------------------------
def three(x: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Two products and a softmax, joined for the caller and for a reduction."""
    whole = torch.cat([x @ w, torch.softmax(x, -1), x @ v], -1)
    return whole, whole.sum(0)


def test_producers_write_their_regions_and_the_join_moves_nothing() -> None:
    check(three, X, W, V)
    plan = final()
    assert joins(plan) == [Join("cat", ("mm", "div", "mm_1"), "cat")]
    text = print_plan(plan)
    assert "buffer mm : f32[96, 48] strides [96, 1] inside cat at 0 on cpu" in text
    assert "buffer div : f32[6, 16, 32] strides [1536, 96, 1] inside cat at 48 on cpu" in text
    assert "join cat = mm, div, mm_1" in text
    assert [s.out for s in plan.externs] == [True, True] and len(plan.launches) == 2
    assert sorted(s.writes for s in plan.launches) == [("div",), ("sum_2",)]
    (said,) = decisions()
    assert said.taken and said.facts["saved_bytes"] > 0 and "3 of 3 pieces by their producers" in said.words


def test_the_bytes_of_the_kernels_are_fewer_than_those_of_one_that_chooses() -> None:
    in_place = check(three, X, W, V)
    moved = sum(r.stages["memory"].hint(b.nbytes) for r in records() for s in r.stages["memory"].launches
                for b in map(r.stages["memory"].buffers.get, {*s.reads, *s.writes}))  # fmt: skip
    got = compiled(three, {"fusion_fuel": 0})(X, W, V)
    same(got, in_place, exact=True)
    plan = final()
    assert not joins(plan)
    assert moved < sum(plan.hint(plan.buffers[b].nbytes) for s in plan.launches for b in {*s.reads, *s.writes})


def test_each_join_takes_one_of_the_fuel() -> None:
    def f(x: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([x @ w, x @ v], -1), torch.cat([x @ v, x @ (w * 2)], -1)

    want = f(X, W, V)
    for fuel in (0, 1, 2):
        same(compiled(f, {"fusion_fuel": fuel})(X, W, V), want, exact=True)
        assert len(joins(final())) == fuel
    compiled(f)(X, W, V)
    assert len(joins(final())) == 2


def test_a_cat_that_one_kernel_reads_stays_a_choice() -> None:
    """rotate_half of llama: nothing is stored between."""

    def rotate(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        return x * c + torch.cat([-x[..., half:], x[..., :half]], -1) * s

    check(rotate, X, torch.randn(16, 32), torch.randn(16, 32), exact=True)
    assert kernels() == 1 and not joins(final())


def test_gradients_of_parts_are_written_into_one() -> None:
    """The backward of a split: its parts' gradients are products, and the next product reads them joined. That of the
    keys is the transpose of a product, which BLAS gives other bits as columns."""
    w = torch.randn(32, 96, requires_grad=True)

    def attention(x: Tensor, w: Tensor) -> Tensor:
        q, k, v = (x @ w).split(32, dim=-1)
        return (q @ k.t()) @ v

    check(attention, torch.randn(24, 32), w, tolerance=1e-4)
    (backward,) = records("backward")
    plan = backward.stages["memory"]
    (joined,) = joins(plan)
    made = [s.results[0] for s in plan.externs if s.out]
    assert [n in made for n in joined.regions] == [True, False, True]
    assert [s.writes for s in plan.launches] == [(joined.regions[1],)]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("how", ["split", "chunk", "narrow", "unbind"])
def test_parts_of_a_split_are_read_where_they_are(how: str, dynamic: bool) -> None:
    def f(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        y = x @ w
        parts = {
            "split": lambda: y.split(16, -1),
            "chunk": lambda: y.chunk(3, -1),
            "narrow": lambda: (y.narrow(-1, 0, 16), y.narrow(-1, 16, 16)),
            "unbind": lambda: y.unflatten(-1, (3, 16)).unbind(-2),
        }[how]()
        return parts[0] @ parts[1].t(), parts[0] @ parts[1].t() * 2

    check(f, torch.randn(24, 32), torch.randn(32, 48), dynamic=dynamic, tolerance=1e-4)
    plan = final()
    assert externs() == ["aten.mm.default"] * len(plan.externs)
    assert len(plan.launches) == 1, "the product by 2 alone"


# -- numbers ------------------------------------------------------------------------------------------
def narrow(x: Tensor) -> Tensor:
    return (x * 2).narrow(0, 0, 1)


CASES: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "products": (three, (X, W, V)),
    "heads": (lambda a, b: torch.cat([(a @ b).transpose(0, 1).flatten(1), (a @ b * 2).transpose(0, 1).flatten(1)], -1),
              (torch.randn(4, 7, 8), torch.randn(4, 8, 8))),
    "one column": (lambda a, b, c: torch.cat([a @ b, a @ c], -1), (X, torch.randn(32, 1), V)),
    "bias": (lambda a, b, c: torch.cat([torch.addmm(c, a, b), a @ b], -1), (X[0], W, torch.randn(48))),
    "rows": (lambda a, b: torch.cat([a[0] @ b, (a[1] @ b).relu(), a[2] @ b]), (X, W)),
    "stack": (lambda a: (s := torch.stack([a.softmax(-1), a.softmax(0) * 3], 1), s.sum(1)), (X,)),
    "pad": (lambda a: F.pad(a.softmax(-1), (1, 2, 0, 3), value=2.0), (X,)),
    "pad and halves": (lambda a: F.pad(a.softmax(-1), (4, 0)), (X.bfloat16(),)),
    "scattered slice": (lambda a, b: torch.slice_scatter(b, a.softmax(-1), 1, 2, 18), (X, torch.randn(6, 20, 32))),
    "scattered row": (lambda a, b: torch.select_scatter(b, a.softmax(-1), 1, 3), (X, torch.randn(6, 5, 16, 32))),
    "nested": (lambda a: torch.cat([torch.cat([a.softmax(-1), a.softmax(0)], 1), a.softmax(1)], 0).sum(2)
               if a.shape[1] == 0 else torch.cat([torch.cat([a.softmax(-1), a.softmax(0)], 1), torch.cat(
                   [a.softmax(1), a + 1], 1)], 2), (X,)),
    "twice": (lambda a: torch.cat([s := a.softmax(-1), s, a], 0), (X,)),
    "two joins": (lambda a: (torch.cat([s := a.softmax(-1), a], 1), torch.cat([a, s], 1)), (X,)),
    "read beside": (lambda a: (torch.cat([s := a.softmax(-1), a.exp()], 1), s.sum(1), s.t() if s.dim() == 2 else s * 2),
                    (X,)),
    "empty": (lambda a: torch.cat([a.softmax(-1), a[:, :0], a.softmax(0)], 1), (X,)),
    "channels": (lambda a: torch.cat([a.softmax(1), a.relu() + a.sum(0)], 1),
                 (torch.randn(2, 5, 4, 3).to(memory_format=torch.channels_last),)),
    "integers": (lambda a: torch.cat([a.cumsum(0), a.cumsum(1), a], 1), (torch.randint(-9, 9, (6, 7)),)),
    "flags": (lambda a: torch.cat([a.cumsum(0) > 2, a > 1], 1), (torch.randint(-9, 9, (6, 7)),)),
    "large": (lambda a: (c := torch.cat([a.softmax(-1), a.softmax(0)], 1)) + c.sum(0), (torch.randn(512, 700),)),
    "taken over": (lambda a: (c := torch.cat([a.softmax(-1), a.softmax(0)], 1)).softmax(1).exp() @ c.t()[:, :4],
                   (torch.randn(512, 700),)),
}  # fmt: skip


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_no_bit_depends_on_where_a_piece_lies(every: None, dynamic: bool) -> None:
    def together(given: list[tuple[Tensor, ...]]) -> list[Any]:
        return [fn(*args) for (fn, _), args in zip(CASES.values(), given, strict=True)]

    args = [a for _, a in CASES.values()]
    got = check(together, args, dynamic=dynamic, tolerance=1e-2)
    assert len(joins(final())) >= 15
    want = compiled(together, {"fusion_fuel": 0}, dynamic=dynamic)(args)
    same(got, want, exact=True)
    assert not joins(final())
    same(compiled(together, {"fusion_fuel": 9}, dynamic=dynamic)(args), want, exact=True)
    same(compiled(together, {"target": "interpret"}, dynamic=dynamic)(args), want, tolerance=1e-2)


@pytest.mark.parametrize("name", CASES)
def test_each_kind_of_join_by_itself(every: None, name: str) -> None:
    fn, args = CASES[name]
    check(fn, *args, tolerance=1e-2, runs=2)
    plan = final()
    assert joins(plan) or name == "one column", [str(d) for d in decisions()]
    assert all(plan.buffers[n].storage == "inside" for j in joins(plan) for n in j.regions)


def test_sizes_of_regions_follow_the_call() -> None:
    def f(x: Tensor, y: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        whole = torch.cat([x @ w, y.softmax(-1)], 0)
        return whole, whole @ w.t()

    run = compiled(f, dynamic=True)
    for n, m in ((5, 3), (17, 64), (40, 9)):
        args = torch.randn(n, 8), torch.randn(m, 24), torch.randn(8, 24)
        same(run(*args), f(*args))
    assert len(records()) == 1 and len(joins(final())) == 1
    assert "buffer div : f32[s17, s21] inside cat at s21*s77" in print_plan(final())


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What Triton's interpreter, in a process of its own, has differently from eager, by case."""
    pytest.importorskip("triton")
    return outcomes_in_triton("tests.passes.test_join", tmp_path_factory.mktemp("cache"))


SMALL = [name for name in CASES if name not in ("large", "taken over")]


@pytest.mark.parametrize("name", SMALL)
def test_triton_writes_regions_too(name: str, interpreted: dict[str, str]) -> None:
    assert interpreted[name] == ""


def triton_cases() -> Iterator[tuple[str, str]]:
    join.Trial.choose = take_all  # type: ignore[method-assign]
    for name in SMALL:
        fn, args = CASES[name]
        try:
            check(fn, *args, options={"target": "triton"}, tolerance=1e-2)
            yield name, "" if joins(final()) or name == "one column" else "nothing is in place"
        except Exception as why:
            yield name, repr(why)


# -- refusals -----------------------------------------------------------------------------------------
def soft(x: Tensor) -> Tensor:
    return x.softmax(-1)


# A reason, what meets with it, the same without the obstacle, and the arguments.
Refusal = tuple[Callable[..., Any], Callable[..., Any], tuple[Tensor, ...]]
REFUSALS: dict[str, Refusal] = {
    "is an input": (lambda x: torch.cat([x, x[:3]]), lambda x: torch.cat([soft(x), soft(x[:3])]), (X,)),
    "is joined in part": (lambda x: torch.cat([soft(x)[:2], x]), lambda x: torch.cat([soft(x[:2]), x]), (X,)),
    "appears twice": (lambda x: torch.cat([s := soft(x), s]), lambda x: torch.cat([soft(x), soft(x + 1)]), (X,)),
    "has another dtype": (lambda x: torch.cat([soft(x), x.double()]),
                          lambda x: torch.cat([soft(x.double()), x.double()]), (X,)),
    "which has no out=": (lambda x: torch.cat([torch.linalg.matrix_exp(x), x]),
                          lambda x: torch.cat([torch.bmm(x, x), x]), (torch.randn(3, 4, 4),)),
    "is returned on its own": (lambda x: (torch.cat([s := soft(x), x]), s),
                               lambda x: (torch.cat([s := soft(x), x]), s + 1), (X,)),
    "lies in": (lambda x: (torch.cat([s := soft(x), x]), torch.cat([x, s])),
                lambda x: (torch.cat([soft(x), x]), torch.cat([x, soft(x + 1)])), (X,)),
    "rows apart where aten.mm.default reads them": (
        lambda x: (torch.cat([s := soft(x), x], -1), s @ s), lambda x: (torch.cat([s := soft(x), x], 0), s @ s),
        (torch.randn(32, 32),)),
    "rows apart where aten.mm.default writes them": (
        lambda x, v: torch.cat([x @ v, x], -1), lambda x, v: torch.cat([x @ v.expand(32, 2), x], -1),
        (torch.randn(32, 32), torch.randn(32, 1))),
    "unaligned": (lambda x, w: torch.cat([x[:3], x @ w]), lambda x, w: torch.cat([x[:16], x @ w]),
                  (torch.randn(32, 5), torch.randn(5, 5))),
    "has an order that no strides": (lambda x: torch.cat([(soft(x) * 2).flatten()[8:104].view(3, 32), x[0]]),
                                     lambda x: torch.cat([soft(x).flatten(0, 1), x[0]]), (X,)),
    "is a fill": (lambda x: F.pad(x, (0, 0, 0, 1)), lambda x: F.pad(soft(x), (0, 0, 0, 1)), (X,)),
}  # fmt: skip


@pytest.mark.parametrize("why", [w for w in REFUSALS if w != "has an order that no strides"])
def test_a_piece_that_stays_outside_says_why_and_goes_inside_without_the_obstacle(every: None, why: str) -> None:
    with_it, without, args = REFUSALS[why]
    check(with_it, *args, tolerance=1e-4)
    refused = [v for v in pieces_of(with_it, args) if why in v]
    assert refused, [str(d) for d in decisions()]
    check(without, *args, tolerance=1e-4)
    assert not [v for v in pieces_of(without, args) if why in v] or why == "is a fill"
    assert joins(final())


def pieces_of(fn: Callable[..., Any], args: tuple[Tensor, ...]) -> list[str]:
    """Why each piece of each candidate is copied, in the plan before fusion."""
    plan = records()[0].stages["lower"]
    rewriting, found = join.Rewriting(plan), []
    for c in sorted(join.candidates(plan), key=lambda c: -c.at):
        found += [v.why for v in rewriting.verdicts(c) if v.why]
        rewriting.write(c)
    return found


def test_a_copy_would_move_what_a_refusal_reports() -> None:
    check(lambda x: torch.cat([x, x * 2]), X)
    (said,) = decisions()
    assert not said.taken and said.facts["saved_bytes"] <= 0 and "moves no more" in said.words


@pytest.mark.parametrize("between", [True, False], ids=["with a peak between", "without"])
def test_memory_is_not_taken_early_where_that_lengthens_its_peak(between: bool) -> None:
    """The first piece is small and early, the second as large as what makes the peak before it is there."""

    def f(x: Tensor, wide: Tensor, back: Tensor) -> tuple[Tensor, Tensor]:
        first = x.softmax(-1)
        y = ((first * 2) @ wide).sort(-1)[0] @ back if between else first * 2
        whole = torch.cat([first, y @ wide], 1)
        return whole @ back[:1, :1].expand(4160, 1), whole.sum(1)

    args = (torch.randn(64, 64), torch.randn(64, 4096), torch.randn(4096, 64))
    check(f, *args, tolerance=1e-2)
    (said,) = decisions()
    assert said.taken != between
    assert ("memory's peak would be" in said.words) == between
    assert bool(joins(final())) != between


# -- memory -------------------------------------------------------------------------------------------
def test_a_piece_and_the_join_that_are_both_returned_are_two_memories() -> None:
    def f(x: Tensor) -> tuple[Tensor, Tensor]:
        s = x.softmax(-1)
        return s, torch.cat([s, x.softmax(0)], 1)

    s, whole = check(f, X)  # `same` compares which outputs share memory
    s.fill_(7)
    assert not (whole == 7).any()


def test_the_whole_lives_from_its_first_region_to_the_last_use_of_any() -> None:
    def f(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        a = x @ w
        whole = torch.cat([a, x @ v], -1)
        return (whole @ whole.t()) @ (a * 2)

    check(f, X[0], W, V, tolerance=1e-3)
    plan = final()
    (joined,) = joins(plan)
    (span,) = [v for v in arena_intervals(plan) if v.buffer == joined.buffer]
    touched = [k for k, s in enumerate(plan.steps) if not isinstance(s, Free)
               and {joined.buffer, *joined.regions} & {*s.reads, *s.writes}]  # fmt: skip
    assert (span.first, span.last) == (touched[0], touched[-1])
    (free,) = [s for s in plan.steps if isinstance(s, Free) and joined.buffer in s.buffers]
    assert {joined.buffer, *joined.regions} <= set(free.buffers)


# -- the verifier -------------------------------------------------------------------------------------
def joined_plan() -> Plan:
    compiled(three)(X, W, V)
    return final()


def test_regions_that_meet_are_found() -> None:
    plan = joined_plan()
    moved = replace(plan.buffers["mm_1"], inside=("cat", as_expr(79)))
    with pytest.raises(VerificationError, match="not each of its elements once"):
        verify_plan(replace(plan, buffers={**plan.buffers, "mm_1": moved}))


def test_a_region_past_the_end_is_found() -> None:
    plan = joined_plan()
    moved = replace(plan.buffers["mm_1"], inside=("cat", as_expr(200)))
    with pytest.raises(VerificationError, match="reaches past"):
        verify_plan(replace(plan, buffers={**plan.buffers, "mm_1": moved}))


def test_a_join_without_a_region_is_found() -> None:
    plan = joined_plan()
    steps = tuple(replace(s, regions=s.regions[1:]) if isinstance(s, Join) else s for s in plan.steps)
    with pytest.raises(VerificationError, match="not each of its elements once"):
        verify_plan(replace(plan, steps=steps))


def test_a_read_before_the_join_is_found() -> None:
    plan = joined_plan()
    last = next(s for s in plan.steps if isinstance(s, Launch) and "cat" in s.reads)
    steps = [s for s in plan.steps if s is not last]
    steps.insert(next(k for k, s in enumerate(steps) if isinstance(s, Join)), last)
    with pytest.raises(VerificationError, match="before anything wrote it"):
        verify_plan(replace(plan, steps=tuple(steps)))


def test_a_region_written_after_the_join_is_found() -> None:
    plan = joined_plan()
    late = next(s for s in plan.steps if isinstance(s, Extern))
    steps = [s for s in plan.steps if s is not late and not isinstance(s, Free)]
    steps = [replace(s, regions=s.regions[1:]) if isinstance(s, Join) else s for s in steps]
    steps.append(late)
    big = {n: replace(b, storage="pooled") if n == "cat" else b for n, b in plan.buffers.items()}
    with pytest.raises(VerificationError):
        verify_plan(replace(plan, steps=tuple(steps), buffers=big))


if __name__ == "__main__":
    print(json.dumps(dict(triton_cases())))
