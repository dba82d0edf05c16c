"""Each option does what it says, seen from outside."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn import functional as F

from minifuse import reports, warm
from minifuse.errors import OptionError
from minifuse.options import Options
from minifuse.passes.remat.policies import resolve
from minifuse.records import RECORDS
from minifuse.remat import Problem
from tests.judge import compiled, externs, kernels, records, same


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x)))).sigmoid() * x.exp()


def trained(options: dict[str, Any] | None = None, **kw: Any) -> list[Tensor]:
    """The output and the gradients of one step of a fixed model on fixed data."""
    torch.manual_seed(0)
    model, x = Block(), torch.randn(24, 16, requires_grad=True)
    out = compiled(model, options, **kw)(x)
    out.square().sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in model.parameters())]


def saved_bytes() -> int:
    """Bytes that the backward takes from the forward, the model's own tensors included."""
    plan = records("backward")[0].stages["memory"]
    return sum(plan.hint(plan.buffers[n].nbytes) for n in plan.inputs if n in plan.buffers)


def test_an_unknown_option_or_mode_is_named_to_the_user() -> None:
    words = r"OptionError.*fusion_feul.*did you mean 'fusion_fuel'.*memory_budget"
    with pytest.raises(BackendCompilerFailed, match=words) as caught:
        compiled(torch.sin, {"fusion_feul": 3})(torch.randn(3))
    assert isinstance(caught.value.inner_exception, OptionError)
    with pytest.raises(BackendCompilerFailed, match=r"OptionError.*no mode 'fastest'.*max-autotune"):
        torch.compile(lambda x: x + 1, backend="minifuse", mode="fastest")(torch.randn(3))


def test_target_interpret_gives_the_same_results_without_a_compiler() -> None:
    want = trained()
    got = trained({"target": "interpret"})
    same(got, want, tolerance=1e-5)
    assert all(not r.stages["unit"].source for r in RECORDS)


def test_fuel_stops_fusion_and_changes_no_bit() -> None:
    want, fused = trained(), kernels()
    counts = []
    for fuel in (0, 3):
        same(trained({"fusion_fuel": fuel}), want, exact=True)
        counts.append(kernels())
    assert counts[0] > counts[1] > fused


def test_remat_policies_change_what_is_saved_and_no_bit() -> None:
    want = trained()
    sizes = {}
    for policy in ("save_all", "priced_mincut", "recompute_all"):
        same(trained({"remat": policy}), want, exact=True)
        sizes[policy] = saved_bytes()
    assert sizes["save_all"] >= sizes["priced_mincut"] >= sizes["recompute_all"]
    assert sizes["save_all"] > sizes["recompute_all"]


def test_an_unknown_policy_is_named() -> None:
    with pytest.raises(BackendCompilerFailed, match="recompute_most"):
        trained({"remat": "recompute_most"})


def test_a_policy_of_the_users_own_is_asked() -> None:
    class Mine:
        name, asked = "mine", 0

        def plan(self, problem: Any) -> Any:
            self.asked += 1
            return resolve("recompute_all").plan(problem)

    policy = Mine()
    want = trained()
    same(trained({"remat": policy}), want, exact=True)
    assert policy.asked == 1


def test_a_smaller_memory_budget_saves_less_and_changes_no_bit() -> None:
    want, sizes = trained(), []
    for budget in (1.0, 0.5, 0.05):
        same(trained({"memory_budget": budget, "on_budget": "best"}), want, exact=True)
        sizes.append(saved_bytes())
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < sizes[0]


def test_a_budget_that_no_plan_meets_is_an_error_or_the_best_there_is() -> None:
    want = trained()
    with pytest.raises(BackendCompilerFailed, match=r"default: the least peak .* was found is .* on_budget"):
        trained({"memory_budget": 1000, "on_budget": "error"})
    same(trained({"memory_budget": 1000, "on_budget": "best"}), want, exact=True)
    same(trained({"memory_budget": 1 << 30, "on_budget": "error"}), want, exact=True)


def test_a_policy_is_a_function_a_plan_in_a_file_or_an_installed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def products(problem: Problem) -> list[str]:
        return [v.name for v in problem.values if v.phase == "forward" and v.kind == "extern"]

    want, path = trained(), tmp_path / "plan.json"
    same(trained({"remat": products}), want, exact=True)
    plan = records("forward")[0].stages["remat"]
    path.write_text(plan.to_json())
    same(trained({"remat": str(path)}), want, exact=True)
    again = records("forward")[0].stages["remat"]
    assert (again.policy, again.saved, again.status) == ("products", plan.saved, f"replayed from {path}")
    assert not warm.plain(Options(remat=str(path)), "c") and warm.plain(Options(remat="mincut"), "c")

    (tmp_path / "offered.py").write_text("def thrifty(problem):\n    return []\n")
    folder = tmp_path / "offered-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: offered\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text("[minifuse.remat]\nthrifty = offered:thrifty\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    same(trained({"remat": "thrifty"}), want, exact=True)
    assert records("forward")[0].stages["remat"].policy == "thrifty"


def test_debug_dir_gets_a_folder_a_graph(tmp_path: Path) -> None:
    trained({"debug_dir": str(tmp_path)})
    folders = sorted(p.name for p in tmp_path.iterdir())
    assert [name.rsplit("_", 1)[1] for name in folders] == ["backward", "forward"]
    for folder in tmp_path.iterdir():
        names = {p.name for p in folder.iterdir()}
        assert {"joint.fx.py", "plan_fuse.txt", "plan_memory.txt", "kernels.c", "program.py"} <= names
        assert isinstance(json.loads((folder / "decisions.json").read_text()), list)
        assert not [n for n in names if n.startswith("tmp") or n.endswith(".tmp")]


def test_a_debug_dir_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        same(trained({"debug_dir": str(blocked)}), trained(), exact=True)


@pytest.mark.parametrize("verify", [True, False])
def test_verify_runs_the_verifier(verify: bool) -> None:
    trained({"verify": verify})
    assert all(("verify" in r.seconds) is verify for r in RECORDS)


def test_deterministic_gives_the_same_bits_for_any_number_of_threads() -> None:
    model = nn.Embedding(5, 64)
    at = torch.randint(0, 5, (4000,))
    threads = torch.get_num_threads()
    found = []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            model.zero_grad()
            compiled(model, {"deterministic": True})(at).sin().sum().backward()
            found.append([model.weight.grad.clone(), *trained({"deterministic": True})])
    finally:
        torch.set_num_threads(threads)
    same(found[0], found[1], exact=True)


@pytest.mark.parametrize("wanted", [True, False])
def test_deterministic_reaches_pytorchs_operators(wanted: bool) -> None:
    seen: list[bool] = []

    @torch.library.custom_op(f"option_effects::mode_{wanted}", mutates_args=())
    def mode(x: Tensor) -> Tensor:
        seen.append(torch.are_deterministic_algorithms_enabled())
        return x.clone()

    mode.register_fake(torch.empty_like)
    compiled(lambda x: mode(x) + 1, {"deterministic": wanted})(torch.randn(3))
    assert seen[-1] is wanted and not torch.are_deterministic_algorithms_enabled()


def test_precise_is_within_one_ulp() -> None:
    x = torch.linspace(-20, 20, 20_001)
    for name in ("exp", "tanh", "erf", "sin", "log1p"):
        fn = getattr(torch, name)
        given = x.abs() if name == "log1p" else x
        got, exact = compiled(fn, {"precise": True})(given), fn(given.double())
        ulp = torch.nextafter(exact.abs().float(), torch.tensor(torch.inf)).double() - exact.abs().float().double()
        assert ((got.double() - exact).abs() / ulp).max() <= 1.01, name


def test_widen_rounds_a_fused_chain_once_and_says_so() -> None:
    def f(x: Tensor, y: Tensor) -> Tensor:
        return ((x * y + x) * y).sin() - y

    x, y = torch.randn(64, 64).bfloat16(), torch.randn(64, 64).bfloat16()
    narrow = compiled(f)(x, y)
    torch.testing.assert_close(narrow, f(x, y), rtol=1e-2, atol=1e-2)
    assert not [d for r in RECORDS for d in r.decisions if d.rule == "widen"]
    wide = compiled(f, {"widen": True})(x, y)
    torch.testing.assert_close(wide, f(x.float(), y.float()).bfloat16(), rtol=0, atol=0)
    assert not torch.equal(wide, narrow)
    (said,) = [d for r in RECORDS for d in r.decisions if d.rule == "widen"]
    assert said.facts["dropped"] == 4 and "depend on what is fused" in said.words


def test_widen_still_rounds_what_it_stores() -> None:
    def f(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x * 1.01
        return y, y * 3

    x = torch.randn(100).half()
    y, z = compiled(f, {"widen": True})(x)
    assert y.dtype is z.dtype is torch.float16
    same(y, f(x)[0], exact=True)
    same(z, (x.float() * 1.01 * 3).half(), exact=True)


def test_cache_dir_gets_the_compiled_kernels(tmp_path: Path) -> None:
    compiled(lambda x: x.sin() * 1.2345678, {"cache_dir": str(tmp_path / "deep")})(torch.randn(7))
    assert [p.suffix for p in (tmp_path / "deep").iterdir()] == [".bin"]


def test_rng_eager_leaves_dropout_to_aten() -> None:
    x = torch.randn(8, 8)
    compiled(lambda x: F.dropout(x), {"rng": "eager", "fallback": "error"})(x)
    assert "minifuse.seed.default" not in externs()
    compiled(lambda x: F.dropout(x), {"rng": "fast"})(x)
    assert externs() == ["minifuse.seed.default"]


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"])
def test_every_mode_gives_eagers_results(mode: str) -> None:
    torch._dynamo.reset()
    x = torch.randn(9)
    same(torch.compile(lambda x: x.sin() + 1, backend="minifuse", mode=mode)(x), x.sin() + 1)


def test_device_model_prices_the_plan_and_changes_no_bit() -> None:
    want = trained({"device_model": "cpu"})
    bounds = {"cpu": 0.0, "H100": 0.0}
    for name in bounds:
        same(trained({"device_model": name}), want, exact=True)
        assert {r.device.name for r in RECORDS} == {name}
        bounds[name] = sum(launch.lower_bound for r in reports() for launch in r.launches)
    assert bounds["H100"] != bounds["cpu"]
    with pytest.raises(
        BackendCompilerFailed, match=r"device_model.*expected one of auto, cpu, A100.*did you mean 'H100'"
    ):
        trained({"device_model": "H10"})


def test_the_cpus_own_rates_are_kept_in_the_cache_directory(tmp_path: Path) -> None:
    trained({"device_model": "auto", "cache_dir": str(tmp_path)})
    assert [p for p in tmp_path.rglob("*") if p.name.startswith("device_")]
    assert {r.device.name for r in RECORDS} == {"cpu"}
