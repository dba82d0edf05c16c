"""Triton kernels mean what the interpreter says they mean, and compile for GPUs that are not there."""

from __future__ import annotations

import ast
import importlib
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.assembled import gpu_target, kernel_resources
from minifuse.codegen.triton import write_kernel
from minifuse.codegen.triton_prelude import HEAD, SOURCES, helpers
from minifuse.errors import MinifuseError
from minifuse.ir import dtypes
from minifuse.ir.parse import parse_kernel
from minifuse.ir.plan import Launch, Plan
from minifuse.ir.verify import verify_plan
from minifuse.options import Options
from minifuse.passes import schedule_triton
from minifuse.passes.batch import batch
from minifuse.passes.context import CompileContext
from minifuse.passes.lower import scattering
from minifuse.passes.lower.pointwise import Unsupported
from minifuse.passes.memory import place
from minifuse.passes.schedule_triton import grid_size
from minifuse.records import RECORDS
from minifuse.runtime import triton_launch
from minifuse.runtime.triton_launch import Launched
from tests.judge import outcomes_in_triton
from tests.kernels.gpu import compile_for

pytest.importorskip("triton")
CASES = Path(__file__).with_name("triton_cases.py")
NAMES = [n.name for n in ast.parse(CASES.read_text()).body if isinstance(n, ast.FunctionDef) and n.decorator_list]
H100, MI300 = "cuda:90", "hip:gfx942"


# -- in Triton's interpreter ------------------------------------------------------------------------
@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each case of `triton_cases` found wrong, from one process that interprets."""
    return outcomes_in_triton("tests.codegen.triton_cases", tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("name", NAMES)
def test_interpreted_triton_does_what_eager_does(name: str, outcomes: dict[str, str]) -> None:
    assert outcomes[name] == ""


def test_cpu_tensors_need_the_interpreter() -> None:
    torch._dynamo.reset()
    f = torch.compile(lambda x: x.sin() + 1, backend="minifuse", options={"target": "triton"})
    with pytest.raises((MinifuseError, torch._dynamo.exc.BackendCompilerFailed), match="TRITON_INTERPRET=1"):
        f(torch.randn(5))


# -- for a GPU that is not there --------------------------------------------------------------------
def plans(
    function: Callable[..., Any], *args: Any, dynamic: bool = False, device: str = "cpu"
) -> Iterator[tuple[Plan, CompileContext]]:
    """The scheduled plans of a function, and of its backward where an argument requires a gradient; `device` names the
    model that prices them."""
    torch._dynamo.reset()
    RECORDS.clear()
    with mock.patch.object(scattering, "_scatter", side_effect=Unsupported("ATen's on a GPU")):
        options = {"target": "interpret", "device_model": device}
        result = torch.compile(function, backend="minifuse", options=options, dynamic=dynamic)(*args)
        loss = result if isinstance(result, Tensor) else result[0]
        if loss.requires_grad:
            loss.float().square().sum().backward()
    for record in list(RECORDS):
        ctx = CompileContext(record.name, record.stage, Options())
        plan = batch(schedule_triton.schedule(record.stages["fuse"], ctx), ctx)
        verify_plan(plan)
        yield place(plan, ctx), ctx


FUNCTIONS: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...]]] = {
    "gelu of a sum": (lambda x, b: F.gelu(x + b), ((512, 1024), (1024,))),
    "layer norm": (lambda x, w, b: F.layer_norm(x, (1024,), w, b), ((512, 1024), (1024,), (1024,))),
    "softmax": (lambda x: x.softmax(-1), ((64, 1000),)),
    "softmax of long rows": (lambda x: x.softmax(-1), ((600, 20_001),)),
    "layer norm of long rows": (lambda x, w: F.layer_norm(x, (40_000,), w), ((600, 40_000), (40_000,))),
    "logsumexp of few long rows": (lambda x: x.logsumexp(-1), ((2, 128_256),)),
    "dropout": (lambda x: F.dropout(x, 0.1), ((64, 100),)),
    "transpose": (lambda x, y: x + y.t(), ((256, 256), (256, 256))),
    "sums": (lambda x: (x.sum(0), x.sum(), x.amax(1), x.argmax(1)), ((640, 512),)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_kernels_compile_for_a_gpu_and_spill_nothing(name: str, dtype: torch.dtype) -> None:
    function, shapes = FUNCTIONS[name]
    args = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
    for plan, ctx in plans(function, *args):
        for _, kernel in compile_for(plan, ctx, gpu_target(H100)):
            assert kernel_resources(kernel)["spilled"] == 0
        assert not [d for d in ctx.decisions if d.rule == "interpreted"]


@pytest.mark.parametrize("dtype", [d for d in dtypes.TABLE if not d.is_complex], ids=str)
def test_every_dtype_compiles_for_a_gpu(dtype: torch.dtype) -> None:
    x = torch.ones(300, 5).to(dtype)
    for plan, ctx in plans(lambda x: x.t().contiguous(), x):
        assert compile_for(plan, ctx, gpu_target(H100))


def test_a_kernel_takes_its_addresses_then_its_sizes_then_what_triton_adds() -> None:
    """As a run hands them over: each in eight bytes, of which a narrower one reads the low ones."""

    def f(table: Tensor, at: Tensor) -> Tensor:
        return F.embedding(at, table) * 2

    for plan, ctx in plans(f, torch.randn(70, 8), torch.randint(0, 70, (33,)), dynamic=True):
        for one, kernel in compile_for(plan, ctx, gpu_target(H100)):
            found = re.findall(r"\.param \.(\w+)(?: \.ptr[ .\w]*)? k_\w+_param_\d+", kernel.asm["ptx"])
            addresses, sizes = len(one.step.kernel.params), len(one.kernel.symbols)
            assert one.kernel.messages
            assert found[: addresses + sizes + 1] == ["u64"] * addresses + ["u32"] * sizes + ["u64"]
            assert found[addresses + sizes + 1 :] == ["u64"] * len(found[addresses + sizes + 1 :])
            assert len(found) <= addresses + sizes + 1 + 4


def scaled_by_all(*xs: Tensor) -> Tensor:
    total = sum(x.square().sum(1, keepdim=True) for x in xs)
    return sum(x * total for x in xs)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("count", "length", "device", "kernels", "spills"),
    [(8, 4096, "H100", 1, False), (2, 16_384, "H100", 1, False), (4, 16_384, "H100", 2, False),
     (4, 16_384, "cpu", 1, True)],
)  # fmt: skip
def test_rows_that_registers_do_not_hold_are_not_fused(
    count: int, length: int, device: str, kernels: int, spills: bool
) -> None:
    """By the estimate, which the assembler bears out: it takes what is not asked of registers, and spills it."""
    ((plan, ctx),) = plans(scaled_by_all, *(torch.randn(64, length) for _ in range(count)), device=device)
    spilled = [kernel_resources(made)["spilled"] for _, made in compile_for(plan, ctx, gpu_target(H100))]
    assert len(spilled) == kernels
    assert any(spilled) is spills
    (record,) = RECORDS
    assert any(d.rule == "spills" for d in record.decisions) is (kernels > 1)


def test_what_few_channels_statistics_are_applied_to_has_a_grid_of_its_own() -> None:
    x, mean = torch.randn(16, 2, 24, 24), torch.randn(2)
    ((plan, _),) = plans(lambda x, m: (F.batch_norm(x, m, torch.ones_like(m), None, None, True), m * 1), x, mean)
    programs = [grid_size(step.schedule).value for step in plan.launches if step.schedule is not None]
    # the images' sums; the channels' statistics, which are written where no later launch loads them; what is normalised
    assert programs[-1] >= 16 * 2
    assert min(programs) == 1
    verify_plan(plan)


@pytest.mark.parametrize(
    ("function", "x", "wide"),
    [(lambda x: x * 2, torch.empty(40_003), True),
     (lambda x: x.softmax(-1), torch.empty(600, 20_008)[:, :20_003], True),
     (lambda x: x.softmax(-1), torch.empty(600, 20_003), False)],
    ids=["flat", "padded rows", "rows at any address"],
)  # fmt: skip
def test_only_the_last_block_has_a_mask_where_that_lets_a_thread_ask_for_more(
    function: Callable[..., Any], x: Tensor, wide: bool
) -> None:
    for plan, ctx in plans(function, x):
        for one, kernel in compile_for(plan, ctx, gpu_target(H100)):
            assert (" if f_" in one.kernel.text) == wide
            assert ("ld.global.v4" in kernel.asm["ptx"]) == wide


def test_one_thread_at_a_time_parses_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two at once fail in Python 3.11, by chance; what comes behind the parser runs beside each other."""
    source = importlib.import_module("triton.compiler").ASTSource
    inside: list[int] = []
    most = 0

    def watched(name: str) -> Callable[..., Any]:
        before = getattr(source, name)

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal most
            inside.append(1)
            most = max(most, len(inside))
            time.sleep(0.01)
            try:
                return before(self, *args, **kwargs)
            finally:
                inside.pop()

        return call

    for name in ("make_ir", "hash"):
        monkeypatch.setattr(source, name, watched(name))
    ((plan, ctx),) = plans(lambda x: (x.sum(0), x.softmax(-1), x.amax(1), x.t() + 1), torch.randn(640, 512))
    every = compile_for(plan, ctx, gpu_target(H100))
    assert len(every) > 1
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda pair: pair[0].compile(replace(pair[0].usual(), aligned=False), gpu_target(H100)), every))
    assert most == 1


def test_kernels_compile_for_an_amd_gpu() -> None:
    function, shapes = FUNCTIONS["layer norm"]
    for plan, ctx in plans(function, *(torch.randn(shape, requires_grad=True) for shape in shapes)):
        for _, kernel in compile_for(plan, ctx, gpu_target(MI300)):
            assert "amdgcn" in kernel.asm


def test_no_multiply_and_add_is_contracted() -> None:
    for plan, ctx in plans(lambda x, y: x * y + x, torch.randn(64, 64), torch.randn(64, 64)):
        ((_, kernel),) = compile_for(plan, ctx, gpu_target(H100))
        assert "fma" not in kernel.asm["ptx"]


def test_a_row_takes_few_barriers_to_sum() -> None:
    # 3 by triton 3.9, 5 by 3.6
    for plan, ctx in plans(lambda x: x.sum(1), torch.randn(600, 4096)):
        ((_, kernel),) = compile_for(plan, ctx, gpu_target(H100))
        assert kernel.asm["ptx"].count("bar.sync") <= 5


def test_one_kernel_serves_every_size() -> None:
    for plan, ctx in plans(lambda x: (x * 2).softmax(-1), torch.randn(60, 70), dynamic=True):
        for one, kernel in compile_for(plan, ctx, gpu_target(H100)):
            assert one.kernel.symbols
            assert kernel.asm["cubin"]


@pytest.mark.parametrize("target", [H100, MI300], ids=("H100", "MI300"))
def test_a_batch_compiles_and_moves_16_bytes_at_a_time(target: tuple[str, Any, int]) -> None:
    """Of tensors that begin on 16 bytes, as those of an allocator do; others are a variant."""
    lists = [[torch.randn(s) for s in ((64, 48), (48,), (16, 48), (4096,))] for _ in range(2)]
    for plan, ctx in plans(lambda xs, ys: [x * 2 + y for x, y in zip(xs, ys, strict=True)], *lists):
        ((one, kernel),) = compile_for(plan, ctx, gpu_target(target))
        assert len(one.step.sizes) == 4
        other = one.compile(replace(one.usual(), aligned=False), gpu_target(target))
        wide = [("global_load_dwordx4", "amdgcn") if target is MI300 else ("ld.global.v4.b32", "ptx")][0]
        assert wide[0] in kernel.asm[wide[1]]
        assert wide[0] not in other.asm[wide[1]]
        if target is H100:
            assert kernel_resources(kernel)["spilled"] == 0


@pytest.mark.parametrize(("length", "dynamic", "barriers"), [(1024, False, 6), (40_000, False, 24), (4000, True, 30)])
def test_a_scan_takes_few_barriers_and_spills_nothing(length: int, dynamic: bool, barriers: int) -> None:
    for plan, ctx in plans(lambda x: x.cumsum(1), torch.randn(600, length), dynamic=dynamic):
        ((_, kernel),) = compile_for(plan, ctx, gpu_target(H100))
        assert kernel_resources(kernel)["spilled"] == 0
        assert kernel.asm["ptx"].count("bar.sync") <= barriers


@pytest.mark.parametrize(
    "body",
    ["store out[i, j] = load x[j, i]", "store out[i, j] = scan(sum, load x[i, j], over j, lanes 16)"],
    ids=["transpose", "scan"],
)  # fmt: skip
def test_offsets_past_two_gigaelements_are_64_bits(body: str, tmp_path: Path) -> None:
    """Nothing of that size is made: the kernel's text and the addresses of what it compiles to say it."""
    kernel = parse_kernel(
        f"kernel big  i < 70000, j < 70000\n  param x : f32[70000, 70000]\n  param out : f32[70000, 70000]\n  {body}\n"
    )
    step = Launch(kernel, ("x", "out"), schedule_triton.choose(kernel, lambda e: e.value))
    written = write_kernel(step)
    assert "tl.program_id(0).to(tl.int64)" in written.text
    text = "\n".join([HEAD, *helpers(written.text), "", written.text, ""])
    one = Launched(getattr(triton_launch.load_module(text, str(tmp_path)), written.name), step, written,
                   torch.device("cpu"))  # fmt: skip
    assert one.usual().wide
    ttir = one.compile(one.usual(), gpu_target(H100)).asm["ttir"]
    widths = re.findall(r"tt\.addptr .*?, tensor<[\dx]*x(i\d+)>|tt\.addptr .*?>, (i\d+)", ttir)
    assert widths
    assert {a or b for a, b in widths} == {"i64"}


def test_what_is_walked_beside_a_row_takes_the_room_that_the_row_leaves() -> None:
    """A row of the outer points alone keeps the middle axis from the grid."""
    kernel = parse_kernel("""kernel gradient  i < 8, j < 196, k < 256
  param g : f32[8, 256]
  param x : f32[8, 196, 256]
  param out : f32[8, 196, 256]
  v0 : f32[i, k] = load g[i, k]
  v1 : f32[i] = reduce(sum, v0, over k, lanes 16)
  v2 : f32[i, j, k] = load x[i, j, k]
  v3 : f32[i, j] = reduce(sum, mul(v0, v2), over k, lanes 16)
  store out[i, j, k] = sub(sub(v0, v1), mul(v2, v3))
""")
    schedule = schedule_triton.choose(kernel, lambda e: e.value)
    assert schedule_triton.problem(kernel, schedule) is None
    held = schedule_triton.blocks(schedule)
    assert schedule_triton.NESTED // 2 <= schedule_triton.elements(kernel, held) <= schedule_triton.NESTED


@pytest.mark.slow
@pytest.mark.parametrize("target", [H100, MI300], ids=("H100", "MI300"))
def test_every_kernel_of_a_training_step_compiles(target: tuple[str, Any, int]) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=500, n_positions=64,
                                     bos_token_id=0, eos_token_id=0)  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"
    tokens = torch.randint(0, 500, (4, 32))
    for plan, ctx in plans(lambda tokens: model(input_ids=tokens, labels=tokens).loss, tokens):
        assert compile_for(plan, ctx, gpu_target(target))
        assert not [d for d in ctx.decisions if d.rule == "interpreted"]


# -- the text ---------------------------------------------------------------------------------------
def test_a_module_is_readable_and_names_its_origins() -> None:
    for plan, ctx in plans(lambda x, b: F.gelu(x + b).softmax(-1), torch.randn(600, 1024), torch.randn(1024)):
        text = triton_launch.module_text(plan, triton_launch.write_all(plan, torch.device("cpu"), ctx))
        ast.parse(text)
        assert "test_triton.py" in text
        assert "tl.arange(0, 1024)" in text
        assert max(len(line) for line in text.splitlines()) <= 200


def test_a_module_is_the_same_for_the_same_plan_and_is_loaded_once(tmp_path: Path) -> None:
    args = torch.randn(64, 64), torch.randn(64, 64)
    texts = []
    for _ in range(2):
        ((plan, ctx),) = plans(lambda x, y: x * y + x, *args)
        texts.append(triton_launch.module_text(plan, triton_launch.write_all(plan, torch.device("cpu"), ctx)))
    assert texts[0] == texts[1]
    module = triton_launch.load_module(texts[0], str(tmp_path))
    assert triton_launch.load_module(texts[1], str(tmp_path)) is module
    assert [p.read_text() for p in (tmp_path / "triton").glob("*.py")] == texts[:1]


def test_helpers_name_only_helpers() -> None:
    for source in SOURCES.values():
        assert set(re.findall(r"\bmf_\w+", source)) <= set(SOURCES)
