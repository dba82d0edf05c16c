"""Compile random programs, many in one C unit, and compare eager, the interpreter and C.

What must agree, and how:
- C with all fusions, with none, and with some: bit for bit; likewise C with one thread and with two;
- the interpreter and C against eager: exact values bit for bit, the others within rounding, judged by the same program
  in float64: no further off than four times what eager is, and a few units in the last place of the largest number;
- strides of outputs against those of the traced graph, and the IR verifier after each pass.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from minifuse.ir.interpret import run_plan
from minifuse.ir.plan import Plan
from minifuse.options import Options
from minifuse.passes.context import CompileContext
from minifuse.passes.decompose import Decompositions
from minifuse.passes.pipeline import make_plan
from minifuse.runtime.build import build_all
from minifuse.runtime.program import Program

from .generate import Recipe, Statement
from .inputs import Input

BATCH = 50
Tensors = list[Tensor]


@dataclass(frozen=True)
class Failure:
    """A program that went wrong: the kind of wrong (stable under shrinking), and what was seen."""

    recipe: Recipe
    kind: str
    detail: str

    @property
    def seed(self) -> int:
        return self.recipe.seed

    def __str__(self) -> str:
        return f"seed {self.seed}: {self.kind}\n{self.detail}\n{self.recipe.script()}"


@dataclass
class Case:
    """A program on its way: traced, planned at several fuels, built."""

    recipe: Recipe
    gm: fx.GraphModule | None = None
    contexts: list[CompileContext] = field(default_factory=list)
    plans: list[Plan] = field(default_factory=list)
    programs: list[Program] = field(default_factory=list)
    failure: Failure | None = None

    def fail(self, kind: str, detail: str) -> None:
        if self.failure is None:
            self.failure = Failure(self.recipe, kind, detail)


def guarded(case: Case, stage: str, work: Callable[[], Any]) -> Any:
    """Run a stage; what it raises is the program's failure, known by its type and words without names and numbers."""
    try:
        return work()
    except Exception as why:
        words = re.sub(r"\W*\b\w*\d\w*\b\W*", " ", str(why))[:60]
        case.fail(f"{stage}: {type(why).__name__}: {words}", traceback.format_exc(limit=-6))
        return None


# -- from a recipe to programs ----------------------------------------------------------------------------------------
def trace(recipe: Recipe) -> fx.GraphModule:
    """The ATen graph of a program, decomposed as the compiler does."""
    mode = "symbolic" if recipe.dynamic else "fake"
    gm = make_fx(recipe.function(), decomposition_table=Decompositions("fast"), tracing_mode=mode)(*recipe.arguments())
    gm.graph.eliminate_dead_code()
    return gm


def prepare(recipe: Recipe, fuels: Sequence[int | None], target: Literal["c", "triton"] = "c") -> Case:
    """Trace and plan a program once a fuel."""
    case = Case(recipe)
    case.gm = guarded(case, "trace", lambda: trace(recipe))
    for k, fuel in enumerate(fuels if case.gm is not None else ()):
        options = Options(target=target, fusion_fuel=fuel, verify=True)
        ctx = CompileContext(f"fuzz{recipe.seed}_{k}", "inference", options)
        plan = guarded(
            case, f"plan at fuel {'all' if fuel is None else 'some'}", lambda c=ctx: make_plan(case.gm.graph, c)
        )
        if plan is None:
            break
        case.contexts.append(ctx)
        case.plans.append(plan)
    return case


def fuels_of(recipe: Recipe) -> list[int | None]:
    """All fusions, none, and for a third of the programs some."""
    return [None, 0, 1 + recipe.seed % 7] if recipe.seed % 3 == 0 else [None, 0]


def check(
    recipes: Iterable[Recipe], fuels: Sequence[int | None] | None = None, target: Literal["c", "triton"] = "c"
) -> list[Failure]:
    """The failures of some programs, built in one C unit; at these amounts of fusion, or at `fuels_of` each."""
    cases = [prepare(r, fuels_of(r) if fuels is None else fuels, target) for r in recipes]
    good = [c for c in cases if c.failure is None]
    jobs = [(plan, ctx) for c in good for plan, ctx in zip(c.plans, c.contexts, strict=True)]
    try:
        built = iter(build_all(jobs)) if jobs else iter(())
        for c in good:
            c.programs = [next(built) for _ in c.plans]
    except Exception:
        for c in good:  # find the one that cannot be built
            guarded(c, "build", lambda c=c: c.programs.extend(build_all(list(zip(c.plans, c.contexts, strict=True)))))
    for c in good:
        if c.failure is None:
            judge(c)
    return [c.failure for c in cases if c.failure is not None]


# -- what a program should give ---------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Expected:
    """What eager returns, the same in float64, which of it is exact, and the largest number on the way to each."""

    eager: Tensors
    precise: Tensors
    exact: list[bool]
    scale: list[float]


_NARROW = ((r"torch\.(float32|bfloat16|float16)", "torch.float64"), (r"\.(float|half)\(\)", ".double()"),
           ("complex64", "complex128"))  # fmt: skip


def expect(recipe: Recipe, sizes: dict[int, int] | None = None) -> tuple[Expected, Tensors]:
    """Run a program in eager, statement by statement beside float64; also gives the inputs after it."""
    inputs = recipe.arguments(sizes)
    values: dict[str, Tensor] = {f"x{k}": x for k, x in enumerate(inputs)}
    precise = {n: _doubled(x) for n, x in values.items()}
    exact = dict.fromkeys(values, True)
    scale = {n: _largest(x) for n, x in values.items()}
    for s in recipe.statements:
        found = _run(str(s), s, values)
        values.update(found)
        if s.exact:
            precise.update({n: _doubled(x) for n, x in found.items()})
        else:
            torch.set_default_dtype(torch.float64)
            try:
                text = str(s)
                for narrow, wide in _NARROW:
                    text = re.sub(narrow, wide, text)
                precise.update(_run(text, s, precise))
            finally:
                torch.set_default_dtype(torch.float32)
        for n, x in found.items():
            exact[n] = s.exact
            largest = max([_largest(x), *(_largest(values[a]) for a in s.args)])
            # errors of one sign add up in a sum
            terms = max(values[a].numel() for a in s.args) / max(x.numel(), 1) if "sum" in s.text else 1
            inherited = [scale[a] * max(terms, 1) for a in s.args if not exact[a]]
            scale[n] = max([largest * _coarseness(x.dtype), *inherited])
    mutated = [values[x].copy_(values[v]) for x, v in recipe.writes]
    names = [*recipe.outputs, *(v for _, v in recipe.writes)]
    results = [*(values[o] for o in recipe.outputs), *mutated]
    kept = [exact[n] for n in names]
    return Expected(results, [precise[n] for n in names], kept, [scale[n] for n in names]), inputs


def _run(text: str, s: Statement, values: dict[str, Tensor]) -> dict[str, Tensor]:
    space: dict[str, Any] = {"torch": torch, "F": F, **{a: values[a] for a in s.args}}
    exec(text, space)
    return {n: space[n] for n in s.results}


def _doubled(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x.clone()


def _coarseness(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps if dtype.is_floating_point else 0.0


def _largest(x: Tensor) -> float:
    x = x.double()
    x = x[x.isfinite()]
    return float(x.abs().max()) if x.numel() else 0.0


def differs(got: Tensor, want: Tensor, precise: Tensor, exact: bool, scale: float) -> str:
    """Why a result is wrong, or nothing."""
    if got.shape != want.shape or got.dtype is not want.dtype:
        return f"expected {want.dtype} of {list(want.shape)}, found {got.dtype} of {list(got.shape)}"
    if not got.numel():
        return ""
    if exact or not want.is_floating_point():
        same = (got == want) | ((got != got) & (want != want))
        return "" if bool(same.all()) else f"expected the same bits{_first(got, want, ~same)}"
    a, b, p = got.double(), want.double(), precise.double()
    finite = b.isfinite() & p.isfinite()
    strange = ~b.isfinite() & ~((a == b) | ((a != a) & (b != b)))
    if bool(strange.any()):
        return f"expected NaN and infinities in the same places{_first(got, want, strange)}"
    eager_off = (b - p).abs()[finite]
    # nothing is more precise than float64, so there eager's own error reads as none
    few = 4096 if want.dtype is torch.float64 else 64
    slack = 4 * (float(eager_off.max()) if eager_off.numel() else 0.0) + few * scale
    wrong = finite & ~((a - p).abs() <= slack)
    return f"off by more than {slack:.3g}{_first(got, want, wrong)}" if bool(wrong.any()) else ""


def _first(got: Tensor, want: Tensor, where: Tensor) -> str:
    at = where.nonzero()[0].tolist()
    expected, found = want[tuple(at)].item(), got[tuple(at)].item()
    return f" at {at} of {list(got.shape)} ({int(where.sum())} elements): {expected!r}, found {found!r}"


def identical(a: Tensor, b: Tensor) -> Tensor:
    """Where two tensors hold the same bits; any NaN equals any other."""
    if not a.is_floating_point():
        return a == b
    return ((a == b) & (torch.signbit(a) == torch.signbit(b))) | ((a != a) & (b != b))


# -- judging ----------------------------------------------------------------------------------------------------------
def judge(case: Case) -> None:
    """Run a built program in every way and note the first thing that is wrong."""
    recipe = case.recipe
    for ctx in case.contexts:
        for d in ctx.decisions:
            if d.rule == "interpreted":
                case.fail("not generated", str(d))
    guarded(case, "run", lambda: at_sizes(case, None))
    if recipe.dynamic and case.failure is None:
        sizes = other_sizes(case)
        if sizes is not None:
            guarded(case, "run at other sizes", lambda: at_sizes(case, sizes))


def other_sizes(case: Case) -> dict[int, int] | None:
    """Other values for the sizes of a dynamic program, if its guards allow any that are tried."""
    found = sorted({s for i in case.recipe.inputs for s in i.shape if s > 1})
    graph = case.gm.graph if case.gm is not None else fx.Graph()
    holders = [n.meta["val"] for n in graph.nodes if n.op == "placeholder"]
    for attempt in ([s + 1 + k for k, s in enumerate(found)], [2 * s for s in found], [3 * s for s in found]):
        sizes = dict(zip(found, attempt, strict=True))
        total = max((torch.Size(sizes.get(s, s) for s in i.shape).numel() for i in case.recipe.inputs), default=0)
        if total > 300_000:
            continue
        try:
            expect(case.recipe, sizes)
            given = case.recipe.arguments(sizes)
            if case.gm.shape_env.evaluate_guards_for_args(holders, given, ignore_static=False) and laid_out(
                holders, given
            ):  # type: ignore[union-attr]
                return sizes
        except (RuntimeError, IndexError, ValueError, TypeError):
            continue
    return None


def laid_out(holders: Tensors, given: Tensors) -> bool:
    """Whether inputs have the strides that were traced, which guards of a bare trace say nothing of."""
    env = {
        s.node.expr: n
        for h, x in zip(holders, given, strict=True)
        for s, n in zip(h.shape, x.shape)
        if isinstance(s, torch.SymInt)
    }
    for h, x in zip(holders, given, strict=True):
        wanted = [s.node.expr.xreplace(env) if isinstance(s, torch.SymInt) else s for s in h.stride()]
        if [int(w) if str(w).isdigit() else w for w in wanted] != list(x.stride()):
            return False
    return True


def call(program: Program, recipe: Recipe, sizes: dict[int, int] | None) -> tuple[Tensors, Tensors]:
    """The outputs of a program, and its inputs after it."""
    inputs = recipe.arguments(sizes)
    return list(program(list(inputs))), inputs


def at_sizes(case: Case, sizes: dict[int, int] | None) -> None:
    recipe = case.recipe
    expected, _ = expect(recipe, sizes)
    written = [int(x[1:]) for x, _ in recipe.writes]
    results: list[tuple[str, Tensors]] = []
    for stage in ("lower", "memory"):
        inputs = recipe.arguments(sizes)
        found = run_plan(case.contexts[0].stages[stage], list(inputs), case.contexts[0].stages.get("constants", {}))
        results.append((f"interpreted {stage}", [*found, *(inputs[k] for k in written)]))
    for ctx, program in zip(case.contexts, case.programs, strict=True):
        torch.set_num_threads(1)
        found, inputs = call(program, recipe, sizes)
        who = f"{ctx.options.target} at fuel {ctx.options.fusion_fuel}"
        results.append((who, [*found, *(inputs[k] for k in written)]))
    torch.set_num_threads(2)
    found, inputs = call(case.programs[0], recipe, sizes)
    torch.set_num_threads(1)
    results.append(("two threads", [*found, *(inputs[k] for k in written)]))
    for who, found in results:
        for k, got in enumerate(found):
            why = differs(got, expected.eager[k], expected.precise[k], expected.exact[k], expected.scale[k])
            if why:
                case.fail(f"{who.split(' at ')[0]} differs from eager", f"{who}, output {k}: {why}\nsizes {sizes}")
    first = results[2][1]
    for who, found in results[3:]:
        for k, (a, b) in enumerate(zip(first, found, strict=True)):
            same = identical(a, b)
            if not bool(same.all()) and not (who == "two threads" and libraries_differ(recipe, sizes, k)):
                case.fail("fusion or threads change bits", f"{who}, output {k}{_first(b, a, ~same)}\nsizes {sizes}")
    if sizes is None:
        strides(case, first)


def libraries_differ(recipe: Recipe, sizes: dict[int, int] | None, k: int) -> bool:
    """Whether eager itself has other bits with two threads: a library's choice, in a Fourier transform for one."""
    found = []
    for threads in (2, 1):
        torch.set_num_threads(threads)
        found.append(expect(recipe, sizes)[0].eager[k])
    return not bool(identical(*found).all())


def strides(case: Case, found: Tensors) -> None:
    """The strides of outputs are those of the graph's results."""
    assert case.gm is not None
    outputs = case.gm.graph.output_node().args[0]
    for k, (node, got) in enumerate(zip(outputs, found, strict=False)):  # type: ignore[arg-type]
        want = [int(s) for s in node.meta["val"].stride()]
        if got.numel() and any(a != b for a, b, n in zip(want, got.stride(), got.shape, strict=True) if n > 1):
            case.fail("strides", f"output {k}: expected {want}, found {list(got.stride())}")


# -- shrinking --------------------------------------------------------------------------------------------------------
def pruned(recipe: Recipe) -> Recipe:
    """Without statements that nothing needs, and with unused inputs reduced to nothing."""
    needed = {*recipe.outputs, *(v for _, v in recipe.writes)}
    kept: list[Statement] = []
    for s in reversed(recipe.statements):
        if needed & set(s.results):
            kept.append(s)
            needed |= set(s.args)
    return replace(recipe, statements=tuple(reversed(kept)))


def smaller(recipe: Recipe) -> Iterable[Recipe]:
    """Programs with less in them: fewer outputs, no writes, an intermediate as an input, plain inputs."""
    for o in recipe.outputs:
        if len(recipe.outputs) > 1:
            yield pruned(replace(recipe, outputs=(o,)))
    for o in recipe.outputs:
        if len(recipe.outputs) > 1:
            yield pruned(replace(recipe, outputs=tuple(x for x in recipe.outputs if x != o)))
    for w in recipe.writes:
        yield pruned(replace(recipe, writes=tuple(x for x in recipe.writes if x != w)))
    values = _values(recipe)
    for s in recipe.statements:
        for r in s.results:
            if r in recipe.outputs and len(recipe.outputs) == 1 and len(s.args):
                for a in s.args:
                    if a[0] == "v":
                        yield pruned(replace(recipe, outputs=(a,)))
    for s in reversed(recipe.statements):
        if len(s.results) == 1 and not recipe.dynamic:
            yield cut(recipe, s, values[s.results[0]])
    for s in recipe.statements:
        for a in s.args:
            for r in s.results:
                if values[a].shape == values[r].shape and values[a].dtype is values[r].dtype:
                    yield pruned(
                        renamed(replace(recipe, statements=tuple(x for x in recipe.statements if x is not s)), r, a)
                    )
    for k, i in enumerate(recipe.inputs):
        if i.layout != "contiguous":
            changed = [*recipe.inputs]
            changed[k] = replace(i, layout="contiguous")
            yield replace(recipe, inputs=tuple(changed))


def cut(recipe: Recipe, s: Statement, value: Tensor) -> Recipe:
    """The program that takes the result of a statement as an input."""
    name = f"x{len(recipe.inputs)}"
    rest = replace(recipe, statements=tuple(x for x in recipe.statements if x is not s))
    kind = "index" if not value.is_floating_point() else "normal" if not s.exact else "grid"
    made = replace(rest, inputs=(*recipe.inputs, Input(tuple(value.shape), value.dtype, values=kind)))
    return pruned(renamed(made, s.results[0], name))


def renamed(recipe: Recipe, old: str, new: str) -> Recipe:
    def swap(names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(new if n == old else n for n in names)

    statements = tuple(replace(s, args=swap(s.args)) for s in recipe.statements)
    writes = tuple((x, new if v == old else v) for x, v in recipe.writes)
    return replace(recipe, statements=statements, outputs=swap(recipe.outputs), writes=writes)


def _values(recipe: Recipe) -> dict[str, Tensor]:
    values = {f"x{k}": x for k, x in enumerate(recipe.arguments())}
    for s in recipe.statements:
        values.update(_run(str(s), s, values))
    return values


def shrink(failure: Failure, target: Literal["c", "triton"] = "c", tries: int = 150) -> Failure:
    """A smaller program that fails in the same way."""
    best = failure
    progress = True
    while progress and tries > 0:
        progress = False
        for candidate in smaller(best.recipe):
            tries -= 1
            if tries < 0:
                break
            if _cost(candidate) >= _cost(best.recipe):
                continue
            try:
                found = check([candidate], target=target)
            except Exception:  # a candidate that eager refuses
                continue
            if found and found[0].kind == failure.kind:
                best, progress = found[0], True
                break
    return best


def _cost(recipe: Recipe) -> tuple[int, int, int, int]:
    layouts = sum(i.layout != "contiguous" for i in recipe.inputs)
    return len(recipe.statements), len(recipe.outputs), len(recipe.writes), layouts
