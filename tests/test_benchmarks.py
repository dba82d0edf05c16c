"""What the benchmarks compute themselves, on cases that can be counted by hand."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks import cpu, instructions, models, peak, planning, products, published
from benchmarks.harness import Board
from minifuse.passes.memory import most_alive
from minifuse.passes.memory import peak as live
from minifuse.passes.remat import mincut
from minifuse.runtime import toolchain
from tests.judge import compiled, records


def test_the_most_that_is_alive_and_where() -> None:
    assert most_alive([(0, 2, 10), (1, 1, 5), (3, 4, 14), (4, 4, 1)]) == (15, 1)
    assert most_alive([]) == (0, 0)


def test_a_result_that_takes_over_what_it_reads_is_one_memory() -> None:
    """A product, and what becomes of it in its place: one matrix, two beside the next product."""
    n = 512

    def fn(x: Tensor) -> Tensor:
        return (x @ x).relu() @ x

    compiled(fn)(torch.randn(n, n))
    plan = records()[0].stages["memory"]
    assert any(b.reuses for b in plan.buffers.values())
    assert live(plan)[0] == 2 * 4 * n * n


def test_an_arena_is_compared_with_what_is_alive_in_it() -> None:
    compiled(lambda x: (x.softmax(-1) @ x).softmax(-1) @ x)(torch.randn(64, 64))
    assert 1.0 <= peak.packing(records()[0].stages["memory"]) <= 1.03


@pytest.mark.skipif(platform.system() != "Linux" or platform.machine() != "x86_64", reason="links libmvec")
def test_the_program_whose_instructions_are_counted_runs(tmp_path: Path) -> None:
    """Two runs with a product between them, a result in place, integers to look up by."""

    def fn(x: Tensor, at: Tensor) -> Tensor:
        return ((x[at] * 2).sum(0) + x @ x).relu().sum(1)

    compiled(fn)(torch.randn(64, 64), torch.randint(0, 64, (64,)))
    stages, tools = records()[0].stages, toolchain.find()
    assert tools is not None
    program = instructions.built(stages["memory"], stages["unit"], tools, tmp_path)
    assert subprocess.run([str(program)]).returncode == 0
    assert instructions.main_of(stages["memory"], stages["unit"]).count("_B, Z, 1);") == len(stages["unit"].functions)


def test_the_layers_of_a_stack_are_compiled_and_nothing_else() -> None:
    stack = nn.Sequential(nn.Linear(4, 4), *(nn.Sequential(nn.Linear(4, 4), nn.GELU()) for _ in range(3)))
    assert models.compile_layers(nn.ModuleDict({"stack": stack, "head": nn.Linear(4, 2)}), "eager") == 4
    assert models.compile_layers(nn.Linear(4, 4), "eager") == 0


def test_the_means_of_training_are_held_to_their_own_target() -> None:
    table: Board = cpu.board("minifuse")
    for name, speed in (("a training", 1.0), ("b training", 1.21), ("a inference", 2.0)):
        table.add(name, vs_inductor=speed, vs_eager=1.0, compile_ratio=0.1, peak_ratio=1.0)
    cpu.summarise(table)
    assert abs(table.rows["geometric mean, training"]["vs inductor"] - 1.1) < 1e-9
    assert "geometric mean, inference" not in table.rows  # of one row
    assert table.short() == []
    table.rows["geometric mean, training"]["vs inductor"] = 1.05
    assert table.short() == ["geometric mean, training"]


def test_published_figures_of_rematerialisation_are_reached() -> None:
    """A layer of GPT-3 holds what Korthikanti's formula says, with and without the core of attention; a chain of 100
    layers holds what Chen's does and two gradients."""
    table = published.board()
    published.korthikanti(table, "GPT-3")
    published.chen(table, 100)
    assert table.short() == []
    layer = table.rows["Korthikanti, GPT-3"]
    for column in ("all GiB", "held GiB"):
        assert abs(layer[column] / layer[f"published {column}"] - 1) < 1e-3


def test_the_cut_of_a_network_weighs_what_another_solver_says() -> None:
    problem = planning.problem_of(1)
    prices, network = planning.asked(problem)
    cut = mincut.minimum_cut(*network)
    assert cut is not None
    assert abs(cut.weight / planning.by_networkx(network) - 1) < 1e-6
    assert mincut.divide(*prices).saved <= problem.by_name.keys()


@pytest.mark.parametrize("kind", ["layer", "input", "weight"])
def test_the_forms_of_a_product_compute_the_same(kind: str) -> None:
    agree(products.product(kind, 24, 40, 56), (24, 56))


def test_the_forms_of_a_convolution_compute_the_same() -> None:
    agree(products.convolution(2, 8, 12, 16, 3, 4), (2, 16, 12, 12))


def agree(calls: products.Calls, shape: tuple[int, ...]) -> None:
    with torch.no_grad():
        found = {name: call() for name, call in calls.items()}
    assert len(found) >= 2
    for result in found.values():
        assert result.shape == shape
        torch.testing.assert_close(result, found["eager"], rtol=1e-4, atol=1e-4)
