"""A small GPT learns Python's own documentation, eager and with minifuse side by side, and minifuse says what it did.

python -m examples.gpt_on_text [--steps 100] [--backend minifuse]      INDUCTOR=1 adds TorchInductor
"""

from __future__ import annotations

import argparse
import copy
import os
import pydoc_data.topics
import time
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table
from torch import Tensor, nn

from benchmarks import harness
from benchmarks.models import Made, resolve
from minifuse.ir.decision import Decision

from .common import reports

CONTEXT, BATCH, HIDDEN, LAYERS, HEADS = 128, 8, 192, 4, 6


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.up, self.down = nn.Linear(HIDDEN, 4 * HIDDEN), nn.Linear(4 * HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, hidden = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        x = x + self.out(attended.reshape(batch, length, hidden))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class GPT(nn.Module):
    """Predicts the next byte; `forward(text, target)` is the mean cross entropy in nats."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(256, HIDDEN), nn.Embedding(CONTEXT, HIDDEN)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, 256)

    def forward(self, text: Tensor, target: Tensor) -> Tensor:
        places = torch.arange(text.shape[1], device=text.device)
        logits = self.head(self.norm(self.blocks(self.token(text) + self.position(places))))
        return F.cross_entropy(logits.flatten(0, 1), target.flatten())


def read_text() -> Tensor:
    """Python's reference documentation, as bytes."""
    text = "\n".join(pydoc_data.topics.topics.values()).encode()
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def draw(text: Tensor) -> tuple[Tensor, Tensor]:
    """A batch of windows at random places, and the same one byte later."""
    windows = text[torch.randint(0, len(text) - CONTEXT - 1, (BATCH, 1)) + torch.arange(CONTEXT + 1)]
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def model_and_batch() -> Made:
    """What the fresh processes that measure memory run."""
    return GPT(), draw(read_text()), {}


@dataclass
class Trainer:
    """One backend's copy of the model; trains it and keeps losses and times."""

    name: str
    model: nn.Module
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.forward = self.model if self.name == "eager" else torch.compile(self.model, backend=resolve(self.name))

    def step(self, text: Tensor, target: Tensor) -> None:
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss = self.forward(text, target)
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - start)

    @property
    def timing(self) -> harness.Sample:
        return harness.Sample.of(self.seconds[2:] or self.seconds)


def train(trainers: list[Trainer], steps: int, console: Console) -> None:
    """Each batch goes to every trainer in turn, so that what slows the machine slows all."""
    text = read_text()
    columns = ("{task.description:10}", "loss {task.fields[loss]}", "{task.fields[speed]}")
    bars = (TextColumn(columns[0]), BarColumn(40), MofNCompleteColumn(), *(TextColumn(c) for c in columns[1:]))
    with Progress(*bars, console=console) as progress:
        tasks: dict[str, TaskID] = {t.name: progress.add_task(t.name, total=steps, loss="", speed="") for t in trainers}
        for _ in range(steps):
            batch = draw(text)
            for trainer in trainers:
                trainer.step(*batch)
                speed = f"{1e3 * trainer.seconds[-1]:7.1f} ms a step"
                progress.update(tasks[trainer.name], advance=1, loss=f"{trainer.losses[-1]:.4f}", speed=speed)


def summary(trainers: list[Trainer], peaks: dict[str, int]) -> Table:
    title = "The same model, the same batches (gap: largest difference of a loss from eager's, relative)"
    table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
    for heading in ("", "loss", "gap", "compile", "step", "speed", "peak"):
        table.add_column(heading, justify="right", no_wrap=True)
    eager = trainers[0]
    for t in trainers:
        table.add_row(
            t.name,
            f"{t.losses[0]:.2f} → {t.losses[-1]:.4f}",
            f"{max(abs(a - b) / a for a, b in zip(eager.losses, t.losses)):.1e}",
            f"{max(t.seconds[0] - t.timing.median, 0):.1f} s",
            str(t.timing),
            harness.ratio(eager.timing.median / t.timing.median),
            harness.megabytes(peaks[t.name]) if t.name in peaks else "-",
        )
    return table


def notable(decisions: list[Decision]) -> list[Decision]:
    """Two fusions and one refusal, each the one worth the most bytes of its rule."""

    def worth(decision: Decision) -> float:
        return max((float(v) for k, v in decision.facts.items() if k.endswith("bytes")), default=0.0)

    ranked = sorted((d for d in decisions if len(d.subject) > 1), key=worth, reverse=True)
    best: dict[tuple[bool, str], Decision] = {}
    for decision in ranked:
        best.setdefault((decision.taken, decision.rule), decision)
    taken, refused = ([d for d in best.values() if d.taken is wanted] for wanted in (True, False))
    return [*taken[:2], *refused[: 3 - len(taken[:2])]]


def explain(console: Console, backend: str) -> None:
    """Kernels and bytes before and after fusion, and three decisions in words."""
    table = Table(title="What fusion did", title_justify="left")
    for heading in ("graph", "kernels before", "after", "bytes before", "after"):
        table.add_column(heading, justify="right")
    decisions: list[Decision] = []
    for r in reports(backend):
        kept, moved = harness.megabytes(r.bytes_unfused), harness.megabytes(r.kernel_bytes)
        table.add_row(r.stage, str(r.kernels_unfused), str(r.kernels), kept, moved)
        decisions.extend(r.decisions)
    if table.row_count:
        console.print(table)
    for decision in notable(decisions):
        console.print(f"• {decision}", markup=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="minifuse")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory, which takes fresh processes")
    options = parser.parse_args()

    console = Console()
    torch.manual_seed(0)
    model = GPT()
    names = ["eager", options.backend] + (["inductor"] if os.environ.get("INDUCTOR") else [])
    trainers = [Trainer(name, copy.deepcopy(model)) for name in names]
    size = sum(p.numel() for p in model.parameters()) / 1e6
    console.print(f"A GPT of {size:.1f} M parameters reads Python's documentation, {BATCH} x {CONTEXT} bytes a step.")
    train(trainers, options.steps, console)
    peaks: dict[str, int] = {}
    if not options.no_memory:
        with console.status("measuring peak memory in fresh processes"):
            for name in names:
                found = harness.peak("examples.gpt_on_text:model_and_batch", name, True)
                peaks |= {name: found} if found else {}
    console.print(summary(trainers, peaks))
    explain(console, options.backend)


if __name__ == "__main__":
    main()
