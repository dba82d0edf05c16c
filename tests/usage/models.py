"""Models small enough to compile in a second or two, and what they are trained on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WORDS, WIDTH, HEADS, LAYERS = 64, 32, 4, 2


class Perceptron(nn.Module):
    """The half of a transformer's block that needs no neighbours."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Block(nn.Module):
    """Causal attention, then a perceptron."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.perceptron = Perceptron(width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return self.perceptron(x)


class Language(nn.Module):
    """Logits of the next word from the numbers of words, (batch, sequence) to (batch, sequence, WORDS)."""

    def __init__(self, block: Callable[[int], nn.Module] = Block, layers: int = LAYERS, width: int = WIDTH) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, width)
        self.blocks = nn.ModuleList(block(width) for _ in range(layers))
        self.head = nn.Linear(width, WORDS)

    def forward(self, words: Tensor) -> Tensor:
        x = self.embed(words)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def texts(batch: int = 4, sequence: int = 8) -> Tensor:
    return torch.randint(3, WORDS, (batch, sequence))


def loss_of(run: Callable[[Tensor], Tensor], words: Tensor) -> Tensor:
    """Mean cross-entropy of each word after the first."""
    return F.cross_entropy(run(words)[:, :-1].flatten(0, 1), words[:, 1:].flatten())


def gradients(model: nn.Module) -> list[Tensor | None]:
    return [p.grad for p in model.parameters()]


def parameters(model: nn.Module) -> list[Tensor]:
    return [p.detach() for p in model.parameters()]
