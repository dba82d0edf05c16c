"""The models of the set that `transformers` lacks, or has in a form that does not compile to one graph."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Self-attention over `[batch, sequence, hidden]`."""

    def __init__(self, hidden: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.out = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        batch, sequence, hidden = x.shape
        q, k, v = self.qkv(x).view(batch, sequence, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(attended.transpose(1, 2).reshape(batch, sequence, hidden))


class ExpertLayer(nn.Module):
    """SwiGLU experts; the two most likely of each token are kept, by weight, in a batched product over all experts."""

    def __init__(self, hidden: int, experts: int, kept: int = 2) -> None:
        super().__init__()
        self.kept = kept
        self.router = nn.Linear(hidden, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, hidden, 4 * hidden) * 0.02)
        self.down = nn.Parameter(torch.randn(experts, 2 * hidden, hidden) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        chances = self.router(flat).softmax(-1)
        least = chances.topk(self.kept, dim=-1).values[:, -1:]
        weights = torch.where(chances >= least, chances, 0.0)
        weights = weights / weights.sum(-1, keepdim=True)
        gate, value = (flat @ self.up).chunk(2, dim=-1)
        mixed = ((F.silu(gate) * value) @ self.down) * weights.t().unsqueeze(-1)
        return mixed.sum(0).view_as(x)


class ExpertBlock(nn.Module):
    def __init__(self, hidden: int, heads: int, experts: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        self.attention = Attention(hidden, heads, causal=True)
        self.experts = ExpertLayer(hidden, experts)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.experts(self.norm2(x))


class MixtureOfExperts(nn.Module):
    """A causal language model of expert blocks; `forward(tokens, labels)` is the mean cross entropy."""

    def __init__(self, vocabulary: int, hidden: int, layers: int, heads: int, experts: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, hidden)
        self.blocks = nn.Sequential(*(ExpertBlock(hidden, heads, experts) for _ in range(layers)))
        self.norm = nn.RMSNorm(hidden)
        self.head = nn.Linear(hidden, vocabulary, bias=False)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        logits = self.head(self.norm(self.blocks(self.embed(tokens))))
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


class GatedScan(nn.Module):
    """minGRU in log space: h[t] = (1 - z[t]) h[t-1] + z[t] g(x[t]), a scan over the sequence.

    Feng et al., "Were RNNs All We Needed?", 2024, appendix B.
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.gate_and_value = nn.Linear(hidden, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.gate_and_value(x).chunk(2, dim=-1)
        log_keep = -F.softplus(gate)
        log_value = -F.softplus(-gate) + torch.where(value >= 0, (F.relu(value) + 0.5).log(), -F.softplus(-value))
        decay = log_keep.cumsum(1)
        return (decay + (log_value - decay).logcumsumexp(1)).exp()


class ScanBlock(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(hidden)
        self.inner = nn.Linear(hidden, 4 * hidden)
        self.scan = GatedScan(2 * hidden)
        self.outer = nn.Linear(2 * hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        state, gate = self.inner(self.norm(x)).chunk(2, dim=-1)
        return x + self.outer(self.scan(F.silu(state)) * F.silu(gate))


class ScanModel(nn.Module):
    """A causal language model of scan blocks; `forward(tokens, labels)` is the mean cross entropy."""

    def __init__(self, vocabulary: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, hidden)
        self.blocks = nn.Sequential(*(ScanBlock(hidden) for _ in range(layers)))
        self.norm = nn.RMSNorm(hidden)
        self.head = nn.Linear(hidden, vocabulary, bias=False)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        logits = self.head(self.norm(self.blocks(self.embed(tokens))))
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


class ResidualConv(nn.Module):
    """Two of (group norm, SiLU, 3x3 convolution) with a skip."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, inner), nn.Conv2d(inner, outer, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(8, outer), nn.Conv2d(outer, outer, 3, padding=1)
        self.skip = nn.Conv2d(inner, outer, 1) if inner != outer else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        return self.conv2(F.silu(self.norm2(y))) + self.skip(x)


class UNet(nn.Module):
    """A denoiser; `forward(noisy, noise)` is the mean square error. Height and width divide by 4."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.down1, self.down2 = ResidualConv(width, width), ResidualConv(width, 2 * width)
        self.middle = ResidualConv(2 * width, 4 * width)
        self.up2, self.up1 = ResidualConv(6 * width, 2 * width), ResidualConv(3 * width, width)
        self.head = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, noisy: Tensor, noise: Tensor) -> Tensor:
        first = self.down1(self.stem(noisy))
        second = self.down2(F.avg_pool2d(first, 2))
        middle = self.middle(F.avg_pool2d(second, 2))
        up = self.up2(torch.cat([F.interpolate(middle, scale_factor=2.0), second], dim=1))
        up = self.up1(torch.cat([F.interpolate(up, scale_factor=2.0), first], dim=1))
        return F.mse_loss(self.head(F.silu(up)), noise)


class DiTBlock(nn.Module):
    """A transformer block with adaptive layer norm: the condition gives scale, shift and gate of both halves.

    Peebles and Xie, "Scalable Diffusion Models with Transformers", 2023 (adaLN-Zero).
    """

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(hidden, elementwise_affine=False, eps=1e-6)
        self.attention = Attention(hidden, heads, causal=False)
        self.mlp = nn.Sequential(
            nn.Linear(hidden, 4 * hidden), nn.GELU(approximate="tanh"), nn.Linear(4 * hidden, hidden)
        )
        self.modulation = nn.Linear(hidden, 6 * hidden)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        parts = self.modulation(F.silu(condition)).unsqueeze(1).chunk(6, dim=-1)
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        x = x + gate1 * self.attention(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class DiT(nn.Module):
    """A stack of DiT blocks over `[batch, patches, hidden]` with a condition `[batch, hidden]`.

    `forward(x, condition, target)` is the mean square error.
    """

    def __init__(self, hidden: int, layers: int, heads: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(DiTBlock(hidden, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(hidden)

    def forward(self, x: Tensor, condition: Tensor, target: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, condition)
        return F.mse_loss(self.norm(x), target)


class MixerBlock(nn.Module):
    def __init__(self, hidden: int, patches: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.tokens = nn.Sequential(nn.Linear(patches, 2 * patches), nn.GELU(), nn.Linear(2 * patches, patches))
        self.channels = nn.Sequential(nn.Linear(hidden, 4 * hidden), nn.GELU(), nn.Linear(4 * hidden, hidden))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class Mixer(nn.Module):
    """MLP-Mixer over `[batch, patches, hidden]`; `forward(x, labels)` is the cross entropy of 1000 classes."""

    def __init__(self, hidden: int, layers: int, patches: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(MixerBlock(hidden, patches) for _ in range(layers)))
        self.norm = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, 1000)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.norm(self.blocks(x)).mean(1)), labels)


class AdamW(nn.Module):
    """One step of AdamW, written op by op, over its own tensors in place; `forward(step)` takes the step as a scalar.

    Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019, algorithm 2.
    """

    def __init__(self, tensors: int, rate: float = 1e-3, decay: float = 0.01) -> None:
        super().__init__()
        self.rate, self.decay = rate, decay
        shapes = [(256, 256), (256,), (256, 512), (64, 64)]
        self.values, self.gradients, self.first, self.second = (
            [torch.rand(shapes[i % 4]) * scale for i in range(tensors)] for scale in (1.0, 0.1, 0.0, 0.0)
        )

    def forward(self, step: Tensor, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8) -> None:
        bias1, bias2 = 1 - beta1**step, (1 - beta2**step).sqrt()
        for value, gradient, first, second in zip(self.values, self.gradients, self.first, self.second):
            first.lerp_(gradient, 1 - beta1)
            second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            value.mul_(1 - self.rate * self.decay)
            value.sub_(self.rate * (first / bias1) / (second.sqrt() / bias2 + eps))
