from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from minifuse.errors import MinifuseError, OptionError
from minifuse.options import MODES, Options
from minifuse.remat import POLICIES


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DEBUG", "VERIFY", "CACHE_DIR", "DEVICE_MODEL", "PLAN_CACHE"):
        monkeypatch.delenv(f"MINIFUSE_{name}", raising=False)


def test_nothing_given_is_the_defaults() -> None:
    assert Options.parse(None, None) == Options.parse({}, "default") == Options()


def test_given_options_are_taken() -> None:
    options = Options.parse({"target": "c", "memory_budget": 0.5, "fusion_fuel": 0})
    assert (options.target, options.memory_budget, options.fusion_fuel) == ("c", 0.5, 0)


def test_an_unknown_option_is_named_with_its_neighbour_and_the_valid_ones() -> None:
    with pytest.raises(OptionError, match=r"no option 'memory_buget' \(did you mean 'memory_budget'\?\)") as caught:
        Options.parse({"memory_buget": 0.5})
    for field in dataclasses.fields(Options):
        assert field.name in str(caught.value) or field.name == "mode"
    assert isinstance(caught.value, MinifuseError)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("target", "cuda"),
        ("target", ["c"]),
        ("remat", None),
        ("remat", ""),
        ("remat", 3),
        ("remat", "recompute"),
        ("memory_budget", -1),
        ("memory_budget", 1.1),
        ("memory_budget", float("nan")),
        ("memory_budget", True),
        ("memory_budget", "half"),
        ("fusion_fuel", -1),
        ("fusion_fuel", 1.5),
        ("fusion_fuel", True),
        ("verify", 1),
        ("deterministic", "yes"),
        ("rng", "slow"),
        ("precise", None),
        ("widen", 0),
        ("debug_dir", 3),
        ("cache_dir", ""),
        ("fallback", "never"),
    ],
)
def test_a_bad_value_is_refused_with_the_option_and_what_it_takes(name: str, value: Any) -> None:
    with pytest.raises(OptionError, match=f"option '{name}': got .*, expected "):
        Options.parse({name: value})


def test_a_near_miss_of_a_choice_is_suggested() -> None:
    with pytest.raises(OptionError, match="did you mean 'triton'"):
        Options.parse({"target": "tritn"})


def test_an_unknown_policy_is_refused_with_the_ones_that_there_are() -> None:
    valid = "expected one of default, priced_mincut, save_all, recompute_all, .*, or an object with plan"
    with pytest.raises(OptionError, match=rf"got 'min_cut', {valid}.* \(did you mean 'mincut'\?\)"):
        Options.parse({"remat": "min_cut"})
    for name in POLICIES:
        assert Options.parse({"remat": name}).remat == name


def test_a_policy_object_is_taken_for_remat() -> None:
    class Policy:
        def plan(self, problem: object) -> None: ...

    policy = Policy()
    assert Options.parse({"remat": policy}).remat is policy


@pytest.mark.parametrize("mode", list(MODES))
def test_every_mode_of_torch_compile_is_accepted(mode: str) -> None:
    assert Options.parse(None, mode).mode == mode


def test_an_unknown_mode_is_an_error_that_lists_the_modes() -> None:
    with pytest.raises(OptionError, match=r"no mode 'max-autotun'.*did you mean 'max-autotune'.*reduce-overhead"):
        Options.parse(None, "max-autotun")


def test_mode_is_no_key_of_options() -> None:
    with pytest.raises(OptionError, match="no option 'mode'"):
        Options.parse({"mode": "default"})


def test_the_environment_fills_what_is_unset_and_yields_to_what_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIFUSE_DEBUG", "dumps")
    monkeypatch.setenv("MINIFUSE_VERIFY", "1")
    monkeypatch.setenv("MINIFUSE_CACHE_DIR", "kernels")
    options = Options.parse()
    assert (options.debug_dir, options.verify, options.cache_dir) == ("dumps", True, "kernels")
    given = Options.parse({"debug_dir": None, "verify": False, "cache_dir": "other"})
    assert (given.debug_dir, given.verify, given.cache_dir) == (None, False, "other")


def test_torchs_deterministic_mode_is_honoured() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert Options.parse().deterministic
        assert not Options.parse({"deterministic": False}).deterministic
    finally:
        torch.use_deterministic_algorithms(False)


def test_options_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Options().target = "c"  # type: ignore[misc]
