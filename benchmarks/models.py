"""The models that the benchmarks and the corpus measure, with random weights.

Each is `MODULE:CALLABLE`, a function without arguments that returns `(model, args, kwargs)`: `benchmarks.models:bert`.
Transformers have 4 layers, hidden size 256, batch 4 and sequence 128 (activations of megabytes); a training step takes
0.1 to 1 s on two cores. The models are those of `transformers` where it has one, else of `benchmarks.modules`.
"""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from . import modules

Made = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]

BATCH, SEQUENCE, HIDDEN, LAYERS, HEADS, VOCABULARY = 4, 128, 256, 4, 4, 8192


def _tokens(batch: int = BATCH, sequence: int = SEQUENCE) -> Tensor:
    return torch.randint(0, VOCABULARY, (batch, sequence))


def _causal(model: Any) -> Made:
    # Without a loss type the model warns that it takes this one, and the warning breaks the graph.
    model.loss_type = "ForCausalLM"
    tokens = _tokens()
    return model, (), {"input_ids": tokens, "labels": tokens, "use_cache": False}


def bert() -> Made:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=4 * HIDDEN,
    )
    tokens = _tokens()
    return transformers.BertForMaskedLM(config), (), {"input_ids": tokens, "labels": tokens}


def gpt2() -> Made:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=HIDDEN,
        n_layer=LAYERS,
        n_head=HEADS,
        n_positions=SEQUENCE,
        bos_token_id=0,
        eos_token_id=0,
    )
    return _causal(transformers.GPT2LMHeadModel(config))


def llama() -> Made:
    """Grouped heads: four query heads share two key heads."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 2,
        intermediate_size=3 * HIDDEN,
    )
    return _causal(transformers.LlamaForCausalLM(config))


def vit() -> Made:
    config = transformers.ViTConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=4 * HIDDEN,
        image_size=160,
        num_labels=1000,
    )
    images, labels = torch.randn(8, 3, 160, 160), torch.randint(0, 1000, (8,))
    return transformers.ViTForImageClassification(config), (), {"pixel_values": images, "labels": labels}


def t5() -> Made:
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=HIDDEN,
        d_kv=HIDDEN // HEADS,
        d_ff=4 * HIDDEN,
        num_layers=LAYERS,
        num_heads=HEADS,
        decoder_start_token_id=0,
    )
    tokens = _tokens()
    return (
        transformers.T5ForConditionalGeneration(config),
        (),
        {"input_ids": tokens, "labels": tokens, "use_cache": False},
    )


def moe() -> Made:
    """Soft-routed mixture of experts: every expert sees every token, so shapes do not depend on the routing."""
    return modules.MixtureOfExperts(VOCABULARY, HIDDEN, LAYERS, HEADS, experts=4), (_tokens(), _tokens()), {}


def scan() -> Made:
    """A gated linear recurrence, the scan of Mamba and its kin."""
    return modules.ScanModel(VOCABULARY, HIDDEN, LAYERS), (_tokens(), _tokens()), {}


def convnext() -> Made:
    config = transformers.ConvNextConfig(hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 4, 2], num_labels=1000)
    images, labels = torch.randn(4, 3, 128, 128), torch.randint(0, 1000, (4,))
    return transformers.ConvNextForImageClassification(config), (), {"pixel_values": images, "labels": labels}


def resnet50() -> Made:
    images, labels = torch.randn(4, 3, 128, 128), torch.randint(0, 1000, (4,))
    model = transformers.ResNetForImageClassification(transformers.ResNetConfig(num_labels=1000))
    return model, (), {"pixel_values": images, "labels": labels}


def unet() -> Made:
    return modules.UNet(width=32), (torch.randn(2, 3, 96, 96), torch.randn(2, 3, 96, 96)), {}


def dit() -> Made:
    """DiT blocks: adaptive layer norm with scale, shift and gate."""
    patches, condition, target = (
        torch.randn(BATCH, 256, HIDDEN),
        torch.randn(BATCH, HIDDEN),
        torch.randn(BATCH, 256, HIDDEN),
    )
    return modules.DiT(HIDDEN, LAYERS, HEADS), (patches, condition, target), {}


def mixer() -> Made:
    return modules.Mixer(HIDDEN, LAYERS, patches=196), (torch.randn(8, 196, HIDDEN), torch.randint(0, 1000, (8,))), {}


def adamw() -> Made:
    """One step of AdamW over the 5 million values of 100 parameters."""
    return modules.AdamW(tensors=100), (torch.tensor(10.0),), {}


@dataclass(frozen=True)
class Entry:
    """A row of the model set: how to make it, and which benchmarks it belongs to."""

    make: Callable[[], Made]
    transformer: bool = False
    training: bool = True  # has a loss to differentiate
    quick: bool = False

    @property
    def name(self) -> str:
        return self.make.__name__

    @property
    def path(self) -> str:
        """`MODULE:CALLABLE`."""
        return f"{self.make.__module__}:{self.name}"


MODELS: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry(bert, transformer=True, quick=True),
        Entry(gpt2, transformer=True),
        Entry(llama, transformer=True, quick=True),
        Entry(vit, transformer=True),
        Entry(t5, transformer=True),
        Entry(moe, transformer=True),
        Entry(scan),
        Entry(convnext),
        Entry(resnet50),
        Entry(unet),
        Entry(dit, transformer=True, quick=True),
        Entry(mixer),
        Entry(adamw, training=False),
    )
}


def select(quick: bool = False, transformers_only: bool = False, names: str = "") -> list[Entry]:
    """The entries a benchmark runs: those named (comma-separated), else the set or a part of it."""
    if names:
        unknown = [n for n in names.split(",") if n not in MODELS]
        if unknown:
            raise SystemExit(f"no model {', '.join(unknown)}; models: {', '.join(MODELS)}")
        return [MODELS[n] for n in names.split(",")]
    return [e for e in MODELS.values() if (e.quick or not quick) and (e.transformer or not transformers_only)]


def load(path: str, seed: int = 0) -> Made:
    """What `MODULE:CALLABLE` makes, with torch's generator seeded; `kwargs` may be left out by the callable."""
    module, _, name = path.partition(":")
    make = getattr(importlib.import_module(module), name)
    torch.manual_seed(seed)
    model, args, *rest = make()
    return model, tuple(args), dict(rest[0]) if rest else {}


def loss_of(output: Any) -> Tensor:
    """The scalar that a training step differentiates: the model's loss, or the mean square of its first tensor."""
    loss = getattr(output, "loss", None)
    if loss is not None:
        return loss
    tensor = (
        output if isinstance(output, Tensor) else next(iter(output.values() if hasattr(output, "values") else output))
    )
    return tensor if tensor.ndim == 0 else tensor.float().square().mean()


class Loss(nn.Module):
    """A model and its loss as one, so that what is compiled is all of a step."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return loss_of(self.model(*args, **kwargs))


def resolve(backend: str) -> str | Callable[..., Any]:
    """What `torch.compile` takes for a backend's name; minifuse's function where the package is not installed."""
    if backend == "minifuse" and backend not in torch._dynamo.list_backends():
        return importlib.import_module("minifuse.backend").minifuse_backend
    if backend == "dynamo":
        return lambda gm, inputs: gm.forward
    return backend


def compile_layers(model: nn.Module, backend: str) -> int:
    """Compile each layer of a stack of equal ones in place, so that their code is compiled once; how many they are.

    A stack is a list or a sequence of modules, two or more of one class; of nested stacks it is the outermost.
    """
    layers = list(model.children())
    if isinstance(model, (nn.ModuleList, nn.Sequential)) and len({type(m) for m in layers}) < len(layers):
        for layer in layers:
            layer.compile(backend=resolve(backend))
        return len(layers)
    return sum(compile_layers(layer, backend) for layer in layers)


@dataclass(frozen=True)
class Step:
    """A step of a model, as a function without arguments. `clear` drops the gradients that it leaves."""

    run: Callable[[], Any]
    parameters: Sequence[nn.Parameter]

    def __call__(self) -> Any:
        return self.run()

    def clear(self) -> None:
        for p in self.parameters:
            p.grad = None


def stepper(path: str, backend: str, training: bool, layers: bool = False) -> Step:
    """One step of a model as a function without arguments: forward and backward, or forward without gradients.

    `backend` is `eager`, `dynamo` (captured, then run as it is) or a name of `torch.compile`'s. Gradients are dropped
    before each step, so that no step accumulates. Inference puts the model into evaluation mode (no dropout). With
    `layers` the layers of its stacks are compiled, one by one, and not the model.
    """
    model, args, kwargs = load(path)
    model.train(training)
    forward: Callable[..., Any] = model
    if layers:
        compile_layers(model, backend)
    elif backend != "eager":
        forward = torch.compile(model, backend=resolve(backend))
    parameters = list(model.parameters())

    def train() -> Any:
        step.clear()
        loss = loss_of(forward(*args, **kwargs))
        loss.backward()
        return loss

    @torch.no_grad()
    def infer() -> Any:
        return forward(*args, **kwargs)

    step = Step(train if training else infer, parameters)
    return step


def main() -> None:
    """Print each model's size and eager step time."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--models", default="", help="comma-separated names")
    parser.add_argument("--backend", default="eager")
    options = parser.parse_args()
    for entry in select(names=options.models):
        parameters = sum(p.numel() for p in load(entry.path)[0].parameters())
        step = stepper(entry.path, options.backend, entry.training)
        first, second = (_timed(step) for _ in range(2))
        print(f"{entry.name:10} {parameters / 1e6:6.1f} M parameters   first {first:6.2f} s   then {second:6.3f} s")


def _timed(step: Callable[[], Any]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
