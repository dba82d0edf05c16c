"""A small vision transformer learns the 8x8 digits of scikit-learn.

python -m examples.vit_digits [--backend inductor] [--steps 60]
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from .common import compare


class ViT(nn.Module):
    """Patches of 2x2 pixels, a transformer encoder, the mean of its tokens, ten classes."""

    def __init__(self, hidden: int = 64, layers: int = 3) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, hidden, kernel_size=2, stride=2)
        self.position = nn.Parameter(torch.zeros(16, hidden))
        block = nn.TransformerEncoderLayer(hidden, 4, 4 * hidden, 0.0, F.gelu, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(block, layers, norm=nn.LayerNorm(hidden), enable_nested_tensor=False)
        self.head = nn.Linear(hidden, 10)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.embed(images).flatten(2).transpose(1, 2) + self.position
        return self.head(self.encoder(tokens).mean(1))


def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(images), labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="minifuse")
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()

    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    picks = [torch.randint(0, len(labels), (128,)) for _ in range(options.steps)]
    compare(options.backend, ViT(), loss, [(images[p], labels[p]) for p in picks])


if __name__ == "__main__":
    main()
