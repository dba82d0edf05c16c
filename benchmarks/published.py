"""Published figures of rematerialisation, beside the same simulated here: nothing is run, and no GPU is needed.

    python -m benchmarks.published [--quick] [--device A100] [--json FILE] [--check]

Each case is captured on tensors without data and planned; bytes and seconds are the simulator's. `all` is what a step
holds that saves everything, `held` what it holds under the policy, `recomputed` the share of a step that is computed
again, `longer` how much longer the step is predicted to take than that of `save_all`, as fused.

* MONeT (Shah, Wu, Mohan, Chidambaram and Krähenbühl, "Memory Optimization for Deep Networks", ICLR 2021): figures of
  the table in README.md of github.com/utsaslab/MONeT, sizes of its examples/check_runtime_original.py; the sum of what
  the model gives is differentiated, as there. Their GB are 2**30 bytes and count parameters, gradients and the image,
  as ours do here; theirs count a library's workspace too, which ours do not. Their seconds are an operator's measured
  on their GPU; ours are its flops at `--device`'s peak or its bytes at its bandwidth, whichever takes longer.
  `recomputed` is seconds of what is recomputed over those of `save_all`'s step, `all` is eager's peak as predicted.
  That README does not name the GPU. A P100 is assumed, for its 16 GB and float32, and the verdict depends on it: by
  `--device A100`, whose rate is that of bfloat16, products cost so little beside memory that UNet is short too.
  `longer` is what their table measures; `recomputed`, to which rows are held, leaves out what saving less gains or
  costs the kernels around it.
* Korthikanti and others, "Reducing Activation Recomputation in Large Transformer Models", 2022 (arXiv 2205.05198),
  sections 4.1 and 5: a layer's activations take sbh (34 + 5as/h) bytes, and 34 sbh without the core of attention, which
  `korthikanti_selective` computes again. `recomputed` counts flops of matrix products, theirs and ours; `all` and
  `held` are what is saved, the input counted.
* Chen, Xu, Zhang and Guestrin, "Training Deep Nets with Sublinear Memory Cost", 2016 (arXiv 1604.06174), section 4: a
  chain of n equal layers in sqrt(n) segments holds 2 sqrt(n) of them and takes one more forward, a third of a step
  whose backward is twice its forward; here by `chen_sqrt`. The layers are of 1 GiB; ours counts gradients too, two at a
  time.

Left out: Checkmate's largest batches (Jain and others, 2020) and rotor's chains (Beaumont and others, 2019). The first
are what a solver finds in hours; the second recompute a value more than once, which a plan here does not.
"""

from __future__ import annotations

import itertools
import math
import sys
from dataclasses import dataclass, replace

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import minifuse
from minifuse.ir.device import DEVICES, DeviceModel, Level
from minifuse.remat import Problem, RematPlan, Value, eager_peak, resolve

from . import harness
from .harness import Board, Column, Target

GIB = 2**30
# NVIDIA Tesla P100 PCIe 16 GB datasheet (2016): 56 SMs, 732 GB/s, 9.3 TFLOP/s fp32; 4 MB of L2 at a round rate.
P100 = DeviceModel("P100", (Level("L2", 4e6, 2e12), Level("HBM", 1e18, 7.32e11)), 9.3e12, 4.65e12, 3e-6, 56, 65_536,
                   link=1.6e10)  # fmt: skip
CHAINS = (100, 400, 1000)


def percent(value: float) -> str:
    return f"{value:.2%}"


def gibibytes(value: float) -> str:
    return f"{value:.4g}"


def board() -> Board:
    return Board(
        "Published figures of rematerialisation beside ours, which are simulated",
        [
            Column("all GiB", gibibytes),
            Column("published all GiB", gibibytes),
            Column("held GiB", gibibytes),
            Column("published held GiB", gibibytes),
            Column("recomputed", percent),
            Column("published recomputed", percent),
            Column("longer", percent),
            Column("planning", harness.seconds),
            Column("status"),
        ],
    )


def problem_of(model: nn.Module, *inputs: Tensor, device: DeviceModel) -> Problem:
    """The problem of a training step, priced by a device's rates; fused as for an A100."""
    found = minifuse.capture(model, *inputs, compile_options={"device_model": "A100", "remat": "save_all"}).problem
    assert found is not None
    return replace(found, device=device, on_budget="best")


def empty(make: type[nn.Module], *args: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A module to train, whose parameters are never written to."""
    with torch.device("meta"):
        model = make(*args)
    return model.to(dtype).to_empty(device="cpu").train()


# -- MONeT


class ResNet50(nn.Module):
    """Transformers' default is torchvision's `resnet50`, which the paper takes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = transformers.ResNetForImageClassification(transformers.ResNetConfig(num_labels=1000))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).logits.sum()


def twice(channels: int, middle: int, out: int) -> nn.Sequential:
    """(Convolution, batch norm, ReLU) twice."""
    sizes = ((channels, middle), (middle, out))
    return nn.Sequential(
        *(m for a, b in sizes for m in (nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(inplace=True)))
    )


class UNet(nn.Module):
    """The paper's: milesial's Pytorch-UNet, with pooling to the larger size in place of interpolation."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 64, 128, 256, 512, 512)
        self.down = nn.ModuleList(twice(a, b, b) for a, b in itertools.pairwise(widths))
        self.up = nn.ModuleList(twice(a, a // 2, b) for a, b in ((1024, 256), (512, 128), (256, 64), (128, 64)))
        self.out = nn.Conv2d(64, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips: list[Tensor] = []
        for k, block in enumerate(self.down):
            skips.append(x := block(F.max_pool2d(x, 2) if k else x))
        for skip, block in zip(skips[-2::-1], self.up, strict=True):
            x = block(torch.cat([skip, F.adaptive_avg_pool2d(x, (skip.shape[2], skip.shape[3]))], 1))
        return self.out(x).sum()


@dataclass(frozen=True)
class Monet:
    """A row of MONeT's table: GB of PyTorch and of a schedule, and the share that the schedule computes again."""

    model: type[nn.Module]
    images: tuple[int, ...]
    eager: float
    budget: float
    recomputed: float


MONET = {
    "ResNet-50": Monet(ResNet50, (184, 3, 224, 224), 15.06, 6.00, 0.0931),
    "UNet": Monet(UNet, (11, 3, 416, 608), 14.32, 7.00, 0.0139),
}


def monet(table: Board, name: str, device: DeviceModel) -> None:
    row = MONET[name]
    problem = problem_of(empty(row.model), torch.empty(row.images), device=device)
    given = sum(v.nbytes for v in problem.values if v.is_given)
    everything = resolve("save_all").plan(problem)
    for policy in ("default", "rotor_dp"):
        plan = resolve(policy).plan(replace(problem, memory_budget=row.budget * GIB - given))
        case = f"MONeT, {name}, {device.name}: {policy}"
        add(table, case, everything, plan, all_GiB=(eager_peak(problem) + given) / GIB, published_all_GiB=row.eager,
            held_GiB=(plan.peak_bytes + given) / GIB, published_held_GiB=row.budget,
            recomputed=plan.extra_seconds / everything.step_seconds,
            published_recomputed=row.recomputed)  # fmt: skip
        if policy == "default":
            table.hold(case, {"held GiB": Target("<=", row.budget), "recomputed": Target("<=", row.recomputed)})


def add(table: Board, case: str, everything: RematPlan, plan: RematPlan, **figures: float) -> None:
    longer = plan.step_seconds / everything.step_seconds - 1
    table.add(case, **figures, longer=longer, planning=plan.solve_seconds, status=plan.status)


# -- Korthikanti


class Layer(nn.Module):
    """A transformer's layer with attention in parts, in the order of the paper's figure 2."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.enter, self.leave = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        images, length, width = x.shape
        split = self.enter(self.norms[0](x)).view(images, length, 3, self.heads, width // self.heads)
        q, k, v = split.permute(2, 0, 3, 1, 4)
        weights = F.softmax(q @ k.transpose(-1, -2) * (width // self.heads) ** -0.5, -1)
        mixed = (F.dropout(weights, 0.1) @ v).transpose(1, 2).reshape(x.shape)
        x = x + F.dropout(self.leave(mixed), 0.1)
        return x + F.dropout(self.down(F.gelu(self.up(self.norms[1](x)))), 0.1)


# Heads, length, width; the share of activations that is dropped, and that of flops that is computed again.
TRANSFORMERS = {"GPT-3": (96, 2048, 12288, 0.70, 0.027), "MT-NLG 530B": (128, 2048, 20480, 0.65, 0.016)}


def korthikanti(table: Board, name: str) -> None:
    heads, length, width, dropped, recomputed = TRANSFORMERS[name]
    x = torch.empty(1, length, width, dtype=torch.bfloat16, requires_grad=True)
    problem = problem_of(empty(Layer, width, heads, dtype=x.dtype), x, device=DEVICES["A100"])
    everything, plan = (resolve(policy).plan(problem) for policy in ("save_all", "korthikanti_selective"))
    unit = x.numel() / GIB  # sbh; the input's bytes are two of them
    every, held = ((p.saved_bytes + 2 * x.numel()) / GIB for p in (everything, plan))
    products = {v.name: v.flops for v in problem.values if v.kind == "extern"}
    case = f"Korthikanti, {name}"
    add(table, case, everything, plan, all_GiB=every, published_all_GiB=unit * (34 + 5 * heads * length / width),
        held_GiB=held, published_held_GiB=34 * unit,
        recomputed=sum(products.get(n, 0.0) for n in plan.recomputed) / sum(products.values()),
        published_recomputed=recomputed)  # fmt: skip
    table.hold(case, {"held GiB": Target("<=", (1 - dropped) * every), "recomputed": Target("<=", recomputed)})


# -- Chen


def chain(layers: int) -> Problem:
    """A chain of layers of 1 GiB, and its backward, which takes twice their flops."""

    def value(name: str, *inputs: str, phase: str = "forward", flops: float = 1e12) -> Value:
        kind = "extern" if inputs else "input"
        return Value(name, phase, kind, GIB, name, inputs, flops, traffic=2 * GIB, stored=True, op="aten.mm")

    last = layers - 1
    names = ["x", *(f"layer{i}" for i in range(layers))]
    gradients = ["tangent", *(f"gradient{last - i}" for i in range(layers))]
    forward = [value(n, i) for i, n in itertools.pairwise(names)]
    backward = [
        value(n, g, f"layer{last - i}", phase="backward", flops=2e12)
        for i, (g, n) in enumerate(itertools.pairwise(gradients))
    ]
    values = (value("x", phase="input"), *forward, value("tangent", phase="tangent"), *backward)
    return Problem(values, (names[-1],), (gradients[-1],), tuple(names[1:]), DEVICES["A100"])


def chen(table: Board, layers: int) -> None:
    problem = chain(layers)
    everything, plan = (resolve(policy).plan(problem) for policy in ("save_all", "chen_sqrt"))
    case, root = f"Chen, {layers} layers", 2 * math.sqrt(layers)
    add(table, case, everything, plan, all_GiB=everything.peak_bytes // GIB, published_all_GiB=layers,
        held_GiB=plan.peak_bytes // GIB, published_held_GiB=root,
        recomputed=plan.extra_flops / sum(v.flops for v in problem.values if v.inputs),
        published_recomputed=1 / 3)  # fmt: skip
    table.hold(case, {"held GiB": Target("<=", root + 2), "recomputed": Target("<=", 1 / 3)})


def main() -> int:
    parser = harness.arguments(__doc__)
    devices = {"P100": P100, **DEVICES}
    parser.add_argument("--device", default="P100", choices=devices, help="whose rates price MONeT's rows")
    options = parser.parse_args()
    table = board()
    for name in () if options.quick else MONET:
        monet(table, name, devices[options.device])
    for name in ("GPT-3",) if options.quick else TRANSFORMERS:
        korthikanti(table, name)
    for layers in CHAINS[:1] if options.quick else CHAINS:
        chen(table, layers)
    return harness.finish(table, options)


if __name__ == "__main__":
    sys.exit(main())
