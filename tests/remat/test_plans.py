"""The problem, the policies and the verifier, on graphs of plain data."""

from __future__ import annotations

import os
import pickle
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import networkx as nx
import pytest
import torch

from benchmarks import published
from minifuse.errors import MinifuseError, RematError
from minifuse.ir.device import CPU
from minifuse.passes.remat.budget import eager_peak, limit_of
from minifuse.passes.remat.mincut import minimum_cut
from minifuse.passes.remat.partition import ask
from minifuse.passes.remat.plan import assemble, closure
from minifuse.remat import POLICIES, RECOMPUTE, SAVE, Choice, Problem, RematPlan, Value, resolve, verify_plan
from tests.remat.harness import Seen, backend, train

MB = 1_000_000


def value(
    name: str, *inputs: str, phase: str = "forward", kind: str = "kernel", nbytes: int = MB, **kw: object
) -> Value:
    return Value(name, phase, kind, nbytes, str(kw.pop("storage", name)), inputs, **kw)  # type: ignore[arg-type]


def chain(*extra: Value, required: tuple[str, ...], budget: float = 1.0) -> Problem:
    """x, then a matmul, then what is given, then a gradient that reads `required`."""
    values = (
        value("x", phase="input", kind="input"),
        value("mm", "x", kind="extern", flops=1e9, traffic=3 * MB),
        *extra,
        value("tangent", phase="tangent", kind="input"),
        value("grad", "tangent", *required, phase="backward"),
    )
    return Problem(values, (extra[-1].name if extra else "mm",), ("grad",), required, CPU, budget)


def random_problem(rng: random.Random, size: int, budget: float = 1.0) -> Problem:
    values = [value(f"x{i}", phase="input", kind="input", nbytes=rng.randint(1, 9) * MB) for i in range(2)]
    for i in range(size):
        inputs = tuple({rng.choice(values[-8:]).name for _ in range(rng.randint(1, 3))})
        kind = rng.choice(("kernel", "kernel", "kernel", "reduction", "extern", "view"))
        if kind == "view":
            base = next(v for v in values if v.name == inputs[0])
            values.append(value(f"v{i}", base.name, kind="view", nbytes=base.nbytes, storage=base.storage))
            continue
        nbytes = rng.randint(1, 99) * MB // 10
        flops = nbytes * (rng.randint(100, 4000) if kind == "extern" else rng.randint(1, 60) / 4)
        drawn = kind == "kernel" and rng.random() < 0.1
        values.append(
            value(f"v{i}", *inputs, kind=kind, nbytes=nbytes, flops=flops, traffic=float(nbytes), is_random=drawn)
        )
    required = tuple(v.name for v in values if rng.random() < 0.4 or v is values[-1])
    backward = value("grad", *required, phase="backward")
    return Problem((*values, backward), (values[-1].name,), ("grad",), required, CPU, budget)


def test_the_cut_weighs_what_networkx_says():
    rng = random.Random(0)
    for _ in range(1000):
        size = rng.randint(2, 30)
        graph = nx.DiGraph()
        graph.add_nodes_from(range(size))
        edges = []
        for u in range(size):
            for v in rng.sample(range(u + 1, size), k=min(rng.randint(0, 4), size - u - 1)):
                infinite = rng.random() < 0.2
                capacity = float("inf") if infinite else float(rng.randint(0, 1000))
                edges.append((u, v, capacity))
                graph.add_edge(u, v, capacity=capacity)
        cut = minimum_cut(size, edges, 0, size - 1)
        try:
            expected = nx.minimum_cut_value(graph, 0, size - 1)
        except nx.NetworkXUnbounded:
            assert cut is None
            continue
        assert cut is not None
        assert cut.weight == cut.lower_bound == expected


def test_a_scaled_cut_is_within_its_proven_bound():
    rng = random.Random(1)
    for magnitude in (1e-9, 1.0, 1e12):
        for _ in range(60):
            size = rng.randint(3, 30)
            edges = [
                (u, v, magnitude * rng.random() ** 4)
                for u in range(size)
                for v in rng.sample(range(u + 1, size), k=min(3, size - u - 1))
            ]
            graph = nx.DiGraph()
            graph.add_nodes_from(range(size))
            graph.add_weighted_edges_from(edges, weight="capacity")
            expected = nx.minimum_cut_value(graph, 0, size - 1)
            cut = minimum_cut(size, edges, 0, size - 1)
            assert cut is not None
            assert cut.lower_bound <= expected * (1 + 1e-9)
            assert cut.weight == pytest.approx(expected, rel=1e-5, abs=1e-6 * magnitude)


def test_the_default_plan_is_the_least_of_all_plans():
    rng = random.Random(2)
    for _ in range(40):
        problem = random_problem(rng, 7)
        plan = resolve("priced_mincut").plan(problem)
        if plan.status != "optimal":
            continue
        names = [v.name for v in problem.values if v.phase == "forward" and v.kind != "view"]
        best = float("inf")
        for mask in range(2 ** len(names)):
            saved = frozenset(n for i, n in enumerate(names) if mask >> i & 1)
            actions = closure(problem, saved)
            again = [problem[n] for n, a in actions.items() if a == RECOMPUTE]
            if any(v.kind == "extern" or v.pinned for v in again):
                continue
            loading = sum(problem.save_seconds(problem[n]) for n, a in actions.items() if a == SAVE)
            best = min(best, loading + sum(problem.recompute_seconds(v) for v in again))
        loading = sum(problem.save_seconds(problem[n]) for n in plan.saved)
        assert loading + plan.extra_seconds == pytest.approx(best, rel=1e-4)


def test_plans_of_random_problems_are_sound_and_fall_with_the_budget():
    rng = random.Random(3)
    for size in (*[30] * 2, *[120] * 3):  # the small ones are solved exactly too
        problem = random_problem(rng, size)
        for policy in ("save_all", "recompute_all", "chen_sqrt", "mincut"):
            verify_plan(problem, resolve(policy).plan(problem))
        for policy in ("priced_mincut", "default"):
            before = float("inf")
            for budget in (1.0, 0.9, 0.75, 0.5, 0.35, 0.2, 0.1, 0.05, 0.0):
                asked = replace(problem, memory_budget=budget)
                plan = resolve(policy).plan(asked)
                verify_plan(replace(asked, on_budget="best"), plan)
                assert plan.peak_bytes <= before
                if plan.peak_bytes <= limit_of(asked):
                    verify_plan(asked, plan)
                else:
                    assert plan.status.startswith("over budget")
                    with pytest.raises(
                        RematError, match=r"the least peak of a step that was found is .* on_budget='best'"
                    ):
                        verify_plan(asked, plan)
                before = plan.peak_bytes
                if budget == 1.0:
                    assert not [n for n in plan.recomputed if problem[n].kind == "extern"]


def test_problem_and_plan_survive_json():
    problem = replace(random_problem(random.Random(4), 30, 0.5), on_budget="best")
    assert Problem.from_json(problem.to_json()) == problem
    for policy in POLICIES.values():
        plan = policy.plan(problem)
        again = RematPlan.from_json(plan.to_json())
        assert again == plan == pickle.loads(pickle.dumps(plan))
        assert again.actions == plan.actions and "nothing" not in plan.choices
        verify_plan(problem, again)


def test_the_graph_for_networkx_has_costs_on_its_nodes():
    problem = chain(value("a", "mm", flops=MB), required=("a",))
    graph = problem.to_networkx()
    assert list(graph.predecessors("a")) == ["mm"]
    assert graph.nodes["mm"]["save_seconds"] == 2 * MB / CPU.dram
    assert graph.nodes["a"]["required"]
    assert "mm" in str(problem)


def test_a_cheap_cast_is_recomputed_from_its_saved_source():
    problem = chain(value("cast", "mm", nbytes=MB // 2, flops=MB / 4), required=("mm", "cast"))
    plan = resolve("priced_mincut").plan(problem)
    assert plan.choices["mm"].action == SAVE
    assert plan.choices["cast"].action == RECOMPUTE
    assert plan.saved_bytes == MB


def test_a_cast_that_alone_is_read_is_saved_in_place_of_its_source():
    problem = chain(value("cast", "mm", nbytes=MB // 2, flops=MB / 4), required=("cast",))
    assert resolve("priced_mincut").plan(problem).saved_bytes == MB // 2


def test_two_views_of_one_storage_count_once():
    views = (value("a", "mm", kind="view", storage="mm"), value("b", "mm", kind="view", storage="mm"))
    for policy in POLICIES.values():
        if policy.name not in ("recompute_all", "chen_sqrt"):
            plan = policy.plan(chain(*views, required=("a", "b")))
            assert plan.saved_bytes == MB
            assert [n for n in plan.saved if n != "x"] == ["mm"]


def test_a_chain_that_costs_more_than_loading_is_not_recomputed():
    links = [value("k0", "mm", flops=MB)]
    links += [value(f"k{i}", f"k{i - 1}", flops=MB) for i in range(1, 30)]
    plan = resolve("priced_mincut").plan(chain(*links, required=("mm", "k29")))
    assert plan.choices["k29"].action == SAVE
    short = resolve("priced_mincut").plan(chain(*links[:2], required=("mm", "k1")))
    assert short.choices["k1"].action == RECOMPUTE


def test_tags_decide_before_costs():
    cheap = value("a", "mm", flops=1, tag="must_save")
    assert resolve("priced_mincut").plan(chain(cheap, required=("mm", "a"))).choices["a"].action == SAVE
    problem = chain(value("again", "mm", kind="extern", flops=1e12, tag="must_recompute"), required=("again",))
    for policy in POLICIES.values():
        assert policy.plan(problem).choices["again"].action == RECOMPUTE
    drawn = chain(value("drawn", "mm", tag="must_recompute", is_random=True), required=("drawn",))
    for policy in POLICIES.values():
        assert policy.plan(drawn).choices["drawn"].action == SAVE


def broken(plan: RematPlan, **changes: Choice | None) -> RematPlan:
    choices = {**plan.choices, **changes}
    return replace(plan, choices={n: c for n, c in choices.items() if c is not None})


@pytest.mark.parametrize(
    ("pin", "word"),
    [("is_random", "random"), ("has_effect", "effect"), ("is_collective", "collective"), ("binds", "data-dependent")],
)
def test_the_verifier_refuses_to_run_twice_what_may_run_once(pin: str, word: str):
    problem = chain(value("a", "mm", **{pin: True}), required=("a",))
    plan = resolve("priced_mincut").plan(problem)
    verify_plan(problem, plan)
    with pytest.raises(RematError, match=rf"a is recomputed, and may run only once: {word}"):
        verify_plan(problem, assemble(problem, {"mm"}, "wrong"))


def test_the_verifier_names_what_is_missing_unknown_or_out_of_reach():
    problem = chain(value("a", "mm", flops=1), value("b", "a", flops=1), required=("a", "b"))
    plan = resolve("save_all").plan(problem)
    again = replace(plan.choices["b"], action=RECOMPUTE)
    with pytest.raises(RematError, match="a is read by the backward and neither"):
        verify_plan(problem, broken(plan, a=None))
    with pytest.raises(RematError, match="b is recomputed from a, which is neither"):
        verify_plan(problem, broken(plan, a=None, b=again))
    with pytest.raises(RematError, match="ghost does not exist"):
        verify_plan(problem, broken(plan, ghost=replace(again, name="ghost")))
    with pytest.raises(RematError, match="tangent needs a tangent"):
        verify_plan(problem, broken(plan, tangent=replace(again, name="tangent")))
    with pytest.raises(RematError, match="a has the action 'forget'"):
        verify_plan(problem, broken(plan, a=replace(again, name="a", action="forget")))
    with pytest.raises(RematError, match="reports 5 saved bytes"):
        verify_plan(problem, replace(plan, saved_bytes=5))
    with pytest.raises(RematError, match="x is an input"):
        verify_plan(problem, broken(plan, x=replace(again, name="x")))


def test_nothing_is_recomputed_from_an_input_that_the_forward_overwrites():
    values = (
        value("buffer", phase="input", kind="input", savable=False),
        value("a", "buffer", flops=1),
        value("grad", "a", phase="backward"),
    )
    problem = Problem(values, ("a",), ("grad",), ("a",), CPU)
    for policy in POLICIES.values():
        plan = policy.plan(problem)
        verify_plan(problem, plan)
        assert plan.choices["a"].action == SAVE
    with pytest.raises(RematError, match="a is recomputed from buffer, which the forward overwrites"):
        verify_plan(problem, assemble(problem, set(), "wrong"))


def test_a_budget_below_the_gradients_is_refused_with_their_bytes():
    problem = chain(value("a", "mm"), required=("a",), budget=1.5 * MB)
    plan = resolve("default").plan(problem)
    with pytest.raises(RematError, match=r"the budget is 1\.5 MB; raise memory_budget"):
        verify_plan(problem, plan)
    with pytest.raises(RematError, match=r"the budget is 500 kB; the gradients alone are 1 MB; raise memory_budget"):
        verify_plan(replace(problem, memory_budget=MB / 2), plan)


def test_a_problem_without_a_plan_says_which_value_has_none():
    problem = chain(value("token", "mm", has_effect=True, savable=False), required=("token",))
    with pytest.raises(RematError, match=r"no plan: token cannot be saved and may run only once \(effect\)"):
        resolve("priced_mincut").plan(problem)


def test_a_policy_is_found_by_name_or_taken_as_it_is():
    assert resolve("priced_mincut").name == "priced_mincut"
    assert resolve(POLICIES["save_all"]) is POLICIES["save_all"]
    with pytest.raises(
        RematError,
        match=r"no .* 'nope'; policies: default, priced_mincut, save_all, recompute_all, .*, or a plan's path",
    ):
        resolve("nope")
    with pytest.raises(MinifuseError, match="has a `name` and a `plan"):
        resolve(3)  # type: ignore[arg-type]


def test_a_policy_of_the_users_is_verified_like_any_other():
    class Careless:
        name = "careless"

        def plan(self, problem: Problem) -> RematPlan:
            return assemble(problem, set(), self.name)

    x = torch.randn(8, 8)
    with pytest.raises(Exception, match=r"careless: .* is recomputed, and may run only once: random"):
        train(torch.compile(lambda y: torch.dropout(y.exp(), 0.5, True), backend=backend(Careless())), None, x)


def test_a_policy_that_raises_or_returns_no_plan_is_named_with_what_was_found():
    class Unfinished:
        name = "unfinished"

        def plan(self, problem: Problem) -> RematPlan:
            raise KeyError("layer 3")

    class Forgetful:
        name = "forgetful"

        def plan(self, problem: Problem) -> None: ...

    problem = chain(value("a", "mm"), required=("a",))
    with pytest.raises(
        RematError, match=r"'unfinished': expected plan.. to return a RematPlan, found KeyError: 'layer 3'"
    ) as caught:
        ask(Unfinished(), problem)
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(RematError, match=r"'forgetful': expected plan.. to return a RematPlan, found None"):
        ask(Forgetful(), problem)  # type: ignore[arg-type]


def test_a_name_that_no_value_has_cannot_be_saved():
    problem = chain(value("layer_norm", "mm"), required=("layer_norm",))
    with pytest.raises(RematError, match=r"mine: cannot save 'layernorm' \(did you mean 'layer_norm'\?\)"):
        assemble(problem, ["mm", "layernorm"], "mine")


def test_a_reason_that_compares_is_borne_out_by_the_numbers_beside_it():
    problem = chain(
        value("a", "mm", flops=1), value("b", "a", flops=1), value("dear", "b", flops=1e12),
        value("c", "dear", flops=1), required=("b", "c"),
    )  # fmt: skip
    for saved, reasons in (
        (("b", "c"), {"b": "recomputing it would need a and 1 more too, saved or recomputed"}),
        (("mm", "b", "dear", "c"), {"c": "recomputing it would need dear too, saved or recomputed"}),
        (("mm",), {"a": "recomputing it costs less", "dear": "the policy recomputes it"}),
    ):
        choices = assemble(problem, saved, "mine").choices
        assert reasons.items() <= {n: c.reason for n, c in choices.items()}.items()
    for policy in POLICIES.values():
        for choice in policy.plan(problem).choices.values():
            if choice.reason == "loading it costs less":
                assert choice.save_seconds < choice.recompute_seconds
            if choice.reason == "recomputing it costs less":
                assert choice.recompute_seconds < choice.save_seconds


def test_what_stays_inside_one_kernel_takes_no_memory():
    def peak(group: int | None) -> int:
        a, b = value("a", "mm", group=group), value("b", "mm", group=group)
        problem = chain(a, b, value("c", "a", "b", group=group), required=("c",))
        return resolve("save_all").plan(problem).timeline.forward_peak

    assert (peak(None), peak(1)) == (2 * MB, MB)


def test_every_decision_names_its_value_and_what_each_way_costs():
    seen = Seen()
    layers = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.GELU(), torch.nn.Linear(64, 4))
    train(torch.compile(layers, backend=backend(seen=seen)), layers, torch.randn(8, 16))
    assert {d.taken for d in seen.decisions} == {True, False}
    for d in seen.decisions:
        choice = seen.plans[0].choices[d.subject[0]]
        assert d.taken == (choice.action == RECOMPUTE)
        assert d.facts["nbytes"] == choice.nbytes
        assert "saving it takes" in d.words


def test_a_timeline_counts_what_is_saved_the_gradients_and_the_rest_step_by_step():
    problem = chain(value("a", "mm", flops=1), value("b", "a", kind="extern"), required=("mm", "b"))
    plan = resolve("save_all").plan(problem)
    assert plan.timeline.steps == ("mm", "a", "b", "grad")
    assert plan.timeline.forward == 3
    saved, outputs, gradients, temporary = plan.timeline.held
    assert saved == (MB, MB, MB, MB)
    assert outputs == (0, 0, MB, MB)
    assert gradients == (0, 0, 0, MB)
    assert temporary == (0, MB, MB, MB)  # a while b reads it, then the tangent
    assert (plan.peak_bytes, plan.timeline.forward_peak, plan.timeline.boundary) == (4 * MB, 3 * MB, 2 * MB)


def test_a_function_of_the_problem_is_a_policy():
    def keep_products(problem: Problem) -> list[str]:
        return [v.name for v in problem.values if v.kind == "extern"]

    problem = chain(value("a", "mm", flops=1), required=("mm", "a"))
    plan = resolve(keep_products).plan(problem)
    assert (plan.policy, plan.saved, plan.recomputed) == ("keep_products", ("mm",), ("a",))
    with pytest.raises(RematError, match=r"<lambda>: expected a RematPlan or the names of what to save, found 3"):
        resolve(lambda problem: 3).plan(problem)


def test_a_plan_in_a_file_is_replayed_and_one_of_another_graph_is_refused(tmp_path: Path):
    problem = chain(value("a", "mm", flops=1), required=("mm", "a"))
    plan, path = resolve("save_all").plan(problem), tmp_path / "plan.json"
    path.write_text(plan.to_json())
    again = resolve(str(path)).plan(problem)
    verify_plan(problem, again)
    assert (again.policy, again.saved, again.status) == ("save_all", plan.saved, f"replayed from {path}")
    other = chain(value("b", "mm", flops=1), required=("mm", "b"))
    with pytest.raises(RematError, match=rf"{path}: expected a plan of this graph, found a, which is no value of it"):
        resolve(path).plan(other)
    path.write_text("[" + plan.to_json() + "," + resolve("save_all").plan(other).to_json() + "]")
    assert resolve(path).plan(other).saved == ("mm", "b")
    path.write_text(plan.to_json()[:-9])
    with pytest.raises(RematError, match="expected rematerialisation plans as JSON"):
        resolve(path).plan(problem)
    path.write_text("{}")
    with pytest.raises(RematError, match="expected a rematerialisation plan as JSON, found KeyError"):
        resolve(path).plan(problem)
    with pytest.raises(RematError, match="No such file"):
        resolve(tmp_path / "none.json").plan(problem)


def test_two_plans_differ_in_figures_and_in_actions():
    problem = chain(value("a", "mm", flops=1), value("b", "a", flops=1, nbytes=3 * MB), required=("mm", "a", "b"))
    text = resolve("save_all").plan(problem).diff(assemble(problem, ["mm", "b"], "mine"))
    assert text.splitlines()[0] == "save_all -> mine"
    assert "saved_bytes: 5e+06 -> 4e+06 (-1e+06)" in text
    assert "a: save -> recompute, 1 MB" in text and "b: " not in text.partition("extra_seconds")[2]


def test_attention_in_parts_is_recomputed_and_the_rest_saved():
    values = (
        *(value(n, phase="input", kind="input") for n in ("q", "k", "v")),
        value("scores", "q", "k", kind="extern", op="aten.bmm", nbytes=8 * MB, flops=1e9),
        value("exp", "scores", op="aten.exp", nbytes=8 * MB, flops=1e6),
        value("drawn", phase="forward", op="minifuse.uniform", nbytes=8 * MB, is_random=True),
        value("dropped", "exp", "drawn", nbytes=8 * MB),
        value("mixed", "dropped", "v", kind="extern", op="aten.bmm", flops=1e9),
        value("out", "mixed", kind="extern", op="aten.mm", flops=1e9),
        value("grad", "exp", "dropped", "mixed", "out", phase="backward"),
    )
    problem = Problem(values, ("out",), ("grad",), ("exp", "dropped", "mixed", "out"), CPU)
    plan = resolve("korthikanti_selective").plan(problem)
    verify_plan(problem, plan)
    assert set(plan.recomputed) == {"scores", "exp", "dropped", "mixed"}
    assert set(plan.saved) == {"q", "k", "v", "drawn", "out"}


def test_a_mask_of_attention_is_drawn_again_from_its_seed():
    values = (
        *(value(n, phase="input", kind="input") for n in ("q", "k", "v")),
        value("scores", "q", "k", kind="extern", op="aten.bmm", nbytes=8 * MB, flops=1e9),
        value("exp", "scores", op="aten.exp", nbytes=8 * MB, flops=1e6),
        value("seed", phase="forward", kind="extern", nbytes=8, is_random=True),
        value("drawn", "seed", op="minifuse.random", nbytes=8 * MB),
        value("mask", "drawn", op="aten.ge", nbytes=2 * MB),
        value("dropped", "exp", "mask", nbytes=8 * MB),
        value("mixed", "dropped", "v", kind="extern", op="aten.bmm", flops=1e9),
        value("grad", "exp", "mask", "dropped", "mixed", phase="backward"),
    )
    problem = Problem(values, ("mixed",), ("grad",), ("exp", "mask", "dropped", "mixed"), CPU)
    plan = resolve("korthikanti_selective").plan(problem)
    verify_plan(problem, plan)
    assert set(plan.saved) == {"q", "k", "v", "seed"}


def test_a_chain_of_layers_takes_the_square_root_of_its_memory_for_one_more_forward():
    """Chen and others, 2016, section 4: O(sqrt(n)) memory at the price of one more forward."""
    for n in (100, 1000):
        problem = published.chain(n)
        everything, plan = resolve("save_all").plan(problem), resolve("chen_sqrt").plan(problem)
        verify_plan(problem, plan)
        assert everything.peak_bytes >= n * published.GIB
        assert plan.peak_bytes <= 3 * n**0.5 * published.GIB
        assert plan.extra_flops <= sum(v.flops for v in problem.values if v.phase == "forward")


def test_a_long_graph_gives_up_no_more_time_than_its_budget_asks_for():
    """Of few plans that are tried some are about the limit."""
    problem = published.chain(1600)
    plans = [resolve("default").plan(replace(problem, memory_budget=b)) for b in (1.0, 0.8, 0.6, 0.4)]
    assert plans[0].peak_bytes > plans[1].peak_bytes > plans[2].peak_bytes > plans[3].peak_bytes
    assert plans[0].step_seconds < plans[1].step_seconds < plans[2].step_seconds < plans[3].step_seconds
    for plan, share in zip(plans[1:], (0.8, 0.6, 0.4), strict=True):
        assert 0.85 * share <= plan.peak_bytes / eager_peak(problem) <= share


def test_what_ends_a_block_does_not_depend_on_the_order_of_a_set(tmp_path: Path):
    """Two values of one size cross from each block into the next."""
    values = []
    for i in range(1, 13):
        inputs = (f"a{i - 1}", f"b{i - 1}") if i > 1 else ("mm",)
        values.append(value(f"wide{i}", *inputs, kind="extern", nbytes=3 * MB))
        values += [value(f"{kind}{i}", f"wide{i}", kind="extern") for kind in "ab"]
    path = tmp_path / "problem.json"
    path.write_text(chain(*values, required=tuple(v.name for v in values)).to_json())
    script = (
        "import sys; from pathlib import Path; from minifuse.remat import Problem;"
        "from minifuse.passes.remat.blocks import Blocks;"
        "print(Blocks(Problem.from_json(Path(sys.argv[1]).read_text())).mains)"
    )
    found = set()
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed}
        found.add(subprocess.run([sys.executable, "-c", script, path], env=env, check=True, capture_output=True).stdout)
    assert len(found) == 1 and b"b6" in found.pop()


def test_a_knapsack_is_filled_with_what_takes_longest_to_recompute():
    more = [value(f"e{i}", "mm", kind="extern", nbytes=(i + 1) * MB, flops=1e8 * (9 - i)) for i in range(8)]
    problem = chain(*more, required=tuple(v.name for v in more))
    sizes = []
    for budget in (1.0, 0.5, 0.2, 0.0):
        plan = resolve("knapsack_budget").plan(replace(problem, memory_budget=budget))
        verify_plan(problem, plan)
        sizes.append(plan.saved_bytes)
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == 36 * MB and sizes[-1] == 0
    assert sizes[1] <= 18 * MB
    assert resolve("knapsack_budget").plan(replace(problem, memory_budget=0.5)).choices["e0"].action == SAVE
