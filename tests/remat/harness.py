"""Models, and a way to train them under a policy with nothing compiled: both graphs run as FX leaves them."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from minifuse import compat
from minifuse.ir.decision import Decision
from minifuse.passes.remat import partition
from minifuse.passes.remat.build import build_problem
from minifuse.remat import Problem, RematPlan, RematPolicy

GENERATED = frozenset(
    """where clone _to_copy convert_element_type full full_like arange cat slice_scatter select_scatter constant_pad_nd
    gelu gelu_backward native_layer_norm native_layer_norm_backward threshold_backward _softmax
    _softmax_backward_data embedding scalar_tensor zeros zeros_like ones ones_like lift_fresh_copy copy""".split()
)


def is_kernel(n: fx.Node) -> bool:
    """A stand-in for the lowering: pointwise operators and reductions."""
    if n.op != "call_function" or n.target is operator.getitem:
        return False
    tags = getattr(n.target, "tags", ())
    if torch.Tag.nondeterministic_seeded in tags:
        return False
    schema = getattr(n.target, "_schema", None)
    return (
        torch.Tag.pointwise in tags
        or torch.Tag.reduction in tags
        or (schema is not None and schema.name.split("::")[-1] in GENERATED)
    )


@dataclass
class Seen:
    """What a compile went through."""

    plans: list[RematPlan] = field(default_factory=list)
    joints: list[fx.GraphModule] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    forwards: list[fx.GraphModule] = field(default_factory=list)
    backwards: list[fx.GraphModule] = field(default_factory=list)


def backend(
    policy: str | RematPolicy = "priced_mincut", budget: float = 1.0, seen: Seen | None = None
) -> Callable[..., Any]:
    """A Dynamo backend that partitions by a policy and runs the graphs as they are."""
    seen = seen if seen is not None else Seen()

    def boxed(gm: fx.GraphModule, _: Any) -> Callable[..., Any]:
        def run(args: list[Any]) -> Any:
            taken = list(args)
            args.clear()
            return gm(*taken)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    def cut(joint: fx.GraphModule, inputs: Any, *, num_fwd_outputs: int, **kw: Any) -> Any:
        static = kw.get("static_lifetime_input_indices") or ()
        seen.joints.append(joint)
        seen.problems.append(
            build_problem(
                joint,
                num_fwd_outputs,
                None,
                is_kernel,
                memory_budget=budget,
                on_budget="best",
                static_inputs=frozenset(static),
            )
        )
        forward, backward, plan = partition(
            joint,
            inputs,
            num_fwd_outputs=num_fwd_outputs,
            policy=policy,
            budget=budget,
            on_budget="best",
            is_kernel=is_kernel,
            record=seen.decisions.append,
            **kw,
        )
        seen.plans.append(plan)
        seen.forwards.append(forward)
        seen.backwards.append(backward)
        return forward, backward

    table = compat.core_decompositions()
    # torch's decomposition of CPU flash attention leaves out the statistics that its backward reads.
    table.pop(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default, None)
    return compat.aot_autograd(
        fw_compiler=boxed,
        bw_compiler=boxed,
        inference_compiler=boxed,
        partition_fn=cut,
        decompositions=table,
        keep_inference_input_mutations=True,
    )


def train(
    model: Callable[..., torch.Tensor], module: torch.nn.Module | None, *inputs: torch.Tensor
) -> list[torch.Tensor]:
    """Output, gradients of inputs and parameters, and buffers, after one step."""
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    torch.manual_seed(7)
    out = model(*leaves)
    weights = torch.linspace(-1, 1, out.numel()).view(out.shape)
    (out * weights).sum().backward()
    found = [out.detach(), *(x.grad for x in leaves if x.grad is not None)]
    if module is not None:
        found += [p.grad for p in module.parameters() if p.grad is not None]
        found += [b.clone() for b in module.buffers()]
    return found
