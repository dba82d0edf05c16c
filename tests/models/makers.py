"""How a tiny model of a `transformers` family is made, by the kind of its head: `() -> (model, inputs)`.

Whatever a family calls its rates of dropout they are zero, so that one training step has one right answer; inputs are
drawn from torch's generator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

Inputs = dict[str, Any]
Family = Callable[[], tuple[nn.Module, Inputs]]

VOCABULARY, HIDDEN, LAYERS, HEADS, BATCH, SEQUENCE, IMAGE, LABELS = 64, 32, 2, 4, 2, 12, 16, 5

# The names that most configurations share.
WIDTHS = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 2 * HIDDEN,
}
SIZES = {**WIDTHS, "vocab_size": VOCABULARY, "max_position_embeddings": 32}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
PICTURE = {"image_size": IMAGE, "patch_size": 4, "num_channels": 3}


def config(name: str, **settings: Any) -> Any:
    """A family's configuration without dropout, in its parts too."""
    made = getattr(hf, f"{name}Config")(**settings)
    _without_dropout(made)
    return made


def _without_dropout(made: Any) -> None:
    for key, value in list(vars(made).items()):
        if isinstance(value, hf.PreTrainedConfig):
            _without_dropout(value)
        elif "drop" in key and isinstance(value, (float, list, tuple)):
            setattr(made, key, 0.0 if isinstance(value, float) else [0.0] * len(value))


def tokens() -> Tensor:
    return torch.randint(3, VOCABULARY, (BATCH, SEQUENCE))


def images(size: int = IMAGE) -> Tensor:
    return torch.randn(BATCH, 3, size, size)


def labels() -> Tensor:
    return torch.randint(0, LABELS, (BATCH,))


def causal(name: str, head: str = "", **settings: Any) -> Family:
    """A decoder that predicts the next token."""

    def make() -> tuple[nn.Module, Inputs]:
        made = config(name, **{**TOKENS, **settings})
        model = getattr(hf, head or f"{name.removesuffix('Text')}ForCausalLM")(made)
        model.loss_type = "ForCausalLM"  # unset, the model warns that it takes this one, which breaks the graph
        text = tokens()
        return model, {"input_ids": text, "labels": text, "use_cache": False}

    return make


def masked(name: str, head: str = "", mask: bool = True, **settings: Any) -> Family:
    """An encoder that fills in tokens."""

    def make() -> tuple[nn.Module, Inputs]:
        model = getattr(hf, head or f"{name}ForMaskedLM")(config(name, **{**TOKENS, **settings}))
        text = tokens()
        seen = {"attention_mask": torch.ones_like(text)} if mask else {}
        return model, {"input_ids": text, **seen, "labels": text}

    return make


def translating(name: str, head: str = "", **settings: Any) -> Family:
    """An encoder and a decoder over text."""

    def make() -> tuple[nn.Module, Inputs]:
        made = config(name, **{**TOKENS, "decoder_start_token_id": 1, **settings})
        text = tokens()
        model = getattr(hf, head or f"{name}ForConditionalGeneration")(made)
        return model, {"input_ids": text, "labels": text, "use_cache": False}

    return make


def seeing(name: str, head: str = "", size: int = IMAGE, **settings: Any) -> Family:
    """A classifier of images."""

    def make() -> tuple[nn.Module, Inputs]:
        made = config(name, **{"num_labels": LABELS, "image_size": size, "num_channels": 3, **settings})
        model = getattr(hf, head or f"{name}ForImageClassification")(made)
        return model, {"pixel_values": images(size), "labels": labels()}

    return make


def segmenting(name: str, size: int = IMAGE, **settings: Any) -> Family:
    """A classifier of pixels."""

    def make() -> tuple[nn.Module, Inputs]:
        model = getattr(hf, f"{name}ForSemanticSegmentation")(config(name, num_labels=LABELS, **settings))
        return model, {"pixel_values": images(size), "labels": torch.randint(0, LABELS, (BATCH, size, size))}

    return make


def hearing(name: str, **settings: Any) -> Family:
    """A classifier of sound, from samples."""

    def make() -> tuple[nn.Module, Inputs]:
        made = config(name, **{"num_labels": LABELS, **settings})
        model = getattr(hf, f"{name}ForSequenceClassification")(made)
        return model, {"input_values": torch.randn(BATCH, 96), "labels": labels()}

    return make


def telling(name: str, sound: str, shape: tuple[int, ...], **settings: Any) -> Family:
    """Sound, of this shape a sample, to text."""

    def make() -> tuple[nn.Module, Inputs]:
        made = config(name, **TOKENS, decoder_start_token_id=1, vocab_size=VOCABULARY, **settings)
        inputs = {sound: torch.randn(BATCH, *shape), "labels": tokens(), "use_cache": False}
        return getattr(hf, f"{name}ForConditionalGeneration")(made), inputs

    return make


def pairing(name: str, text: Inputs, vision: Inputs, size: int = IMAGE, **settings: Any) -> Family:
    """Texts and images in one space."""

    def make() -> tuple[nn.Module, Inputs]:
        made = config(name, text_config=text, vision_config=vision, **settings)
        words = tokens()
        words[:, -1] = TOKENS["eos_token_id"]
        inputs = {"input_ids": words, "pixel_values": images(size), "return_loss": True}
        return getattr(hf, f"{name}Model")(made), inputs

    return make
