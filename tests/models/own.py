"""Models that no library gives in this form, and those of the benchmarks at a tiny size."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import modules

from .makers import BATCH, HEADS, HIDDEN, LABELS, LAYERS, SEQUENCE, VOCABULARY, Family, images, labels, tokens


class Classifier(nn.Module):
    """A body, a linear head and cross entropy, as `transformers` gives them: a dictionary with the loss."""

    def __init__(self, body: nn.Module, width: int, classes: int = LABELS) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(width, classes)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.body(x))
        return {"loss": F.cross_entropy(logits.flatten(0, -2), labels.flatten()), "logits": logits}


class Lost(nn.Module):
    """A model whose output is its loss."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, args: tuple[Tensor, ...]) -> dict[str, Tensor]:
        return {"loss": self.inner(*args)}


class Recurrent(nn.Module):
    """Tokens through an LSTM or a GRU, both ways."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.cells: Any = kind(HIDDEN, HIDDEN // 2, batch_first=True, bidirectional=True)

    def forward(self, words: Tensor) -> Tensor:
        return self.cells(self.embed(words))[0]


class BasicBlock(nn.Module):
    """Two convolutions with batch norm and a skip (He et al., "Deep Residual Learning for Image Recognition", 2015)."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False), nn.BatchNorm2d(outer)
        self.conv2, self.norm2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False), nn.BatchNorm2d(outer)
        self.skip = nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        return F.relu(self.norm2(self.conv2(y)) + self.skip(x))


def _resnet() -> nn.Module:
    stem = (nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    return nn.Sequential(*stem, BasicBlock(8, 16, 1), BasicBlock(16, 24, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def _of(model: nn.Module, **inputs: Any) -> tuple[nn.Module, dict[str, Any]]:
    return model, inputs


def _lost(model: nn.Module, *args: Tensor) -> tuple[nn.Module, dict[str, Any]]:
    return Lost(model), {"args": args}


OWN: dict[str, Family] = {
    "own_resnet": lambda: _of(Classifier(_resnet(), 24), x=images(32), labels=labels()),
    "unet": lambda: _lost(modules.UNet(8), images(), images()),
    "lstm": lambda: _of(Classifier(Recurrent(nn.LSTM), HIDDEN, VOCABULARY), x=tokens(), labels=tokens()),
    "gru": lambda: _of(Classifier(Recurrent(nn.GRU), HIDDEN, VOCABULARY), x=tokens(), labels=tokens()),
    "mixer": lambda: _lost(modules.Mixer(HIDDEN, LAYERS, SEQUENCE), torch.randn(BATCH, SEQUENCE, HIDDEN), labels()),
    "dit": lambda: _lost(
        modules.DiT(HIDDEN, LAYERS, HEADS),
        torch.randn(BATCH, SEQUENCE, HIDDEN),
        torch.randn(BATCH, HIDDEN),
        torch.randn(BATCH, SEQUENCE, HIDDEN),
    ),
    "soft_experts": lambda: _lost(modules.MixtureOfExperts(VOCABULARY, HIDDEN, LAYERS, HEADS, 4), tokens(), tokens()),
    "gated_scan": lambda: _lost(modules.ScanModel(VOCABULARY, HIDDEN, LAYERS), tokens(), tokens()),
}
