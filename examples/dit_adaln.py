"""A DiT block: adaptive layer norm (scale, shift, gate) fuses with the norm and the residual beside it.

python -m examples.dit_adaln [--backend inductor] [--steps 10]

After Peebles and Xie, "Scalable Diffusion Models with Transformers", 2023.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .common import compare


class AdaLNBlock(nn.Module):
    """x + gate * mlp(norm(x) * (1 + scale) + shift), with scale, shift and gate from the condition."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(hidden, 3 * hidden)
        self.up, self.down = nn.Linear(hidden, 2 * hidden), nn.Linear(2 * hidden, hidden)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(F.silu(condition)).unsqueeze(1).chunk(3, dim=-1)
        modulated = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift
        return x + gate * self.down(F.gelu(self.up(modulated), approximate="tanh"))


class Denoiser(nn.Module):
    def __init__(self, hidden: int, layers: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(AdaLNBlock(hidden) for _ in range(layers))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, condition)
        return x


def loss(model: nn.Module, x: Tensor, condition: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(model(x, condition), target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="minifuse")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--hidden", type=int, default=192)
    options = parser.parse_args()

    torch.manual_seed(0)
    shape = (8, 256, options.hidden)
    target = torch.randn(shape)
    batches = [(target + torch.randn(shape), torch.randn(8, options.hidden), target) for _ in range(options.steps)]
    compare(options.backend, Denoiser(options.hidden, layers=4), loss, batches)


if __name__ == "__main__":
    main()
