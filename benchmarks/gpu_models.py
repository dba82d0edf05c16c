"""Models at the width that they are used at, in bfloat16, for the GPU's benchmark.

Weights are random. Transformers have the published widths, heads and vocabularies, and `LAYERS` of their layers: equal
layers repeat, so a compile costs less while the share of each operator in a layer stays. ResNet-50 is whole. Each is
`MODULE:CALLABLE` as in `benchmarks.models`.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers

from . import modules
from .models import Entry, Made

LAYERS = 4
HALF = torch.bfloat16


def _tokens(vocabulary: int, batch: int, sequence: int) -> torch.Tensor:
    return torch.randint(0, vocabulary, (batch, sequence))


def _causal(model: Any, vocabulary: int, batch: int, sequence: int) -> Made:
    model.loss_type = "ForCausalLM"
    tokens = _tokens(vocabulary, batch, sequence)
    return model.to(HALF), (), {"input_ids": tokens, "labels": tokens, "use_cache": False}


def bert_base() -> Made:
    """Devlin et al. 2019: 768 wide, 12 heads; 32 sequences of 512."""
    config = transformers.BertConfig(num_hidden_layers=LAYERS)
    tokens = _tokens(config.vocab_size, 32, 512)
    return transformers.BertForMaskedLM(config).to(HALF), (), {"input_ids": tokens, "labels": tokens}


def gpt2_small() -> Made:
    """Radford et al. 2019: 768 wide, 12 heads; 16 sequences of 1024."""
    config = transformers.GPT2Config(n_layer=LAYERS)
    return _causal(transformers.GPT2LMHeadModel(config), config.vocab_size, 16, 1024)


def llama_1b() -> Made:
    """Llama 3.2 1B (Meta 2024): 2048 wide, 32 heads that share 8 keys, 128,256 tokens; 4 sequences of 2048."""
    config = transformers.LlamaConfig(
        vocab_size=128_256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=LAYERS,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    return _causal(transformers.LlamaForCausalLM(config), config.vocab_size, 4, 2048)


def vit_base() -> Made:
    """Dosovitskiy et al. 2021: ViT-B/16, 128 images of 224 x 224."""
    config = transformers.ViTConfig(num_hidden_layers=LAYERS, num_labels=1000)
    images, labels = torch.randn(128, 3, 224, 224, dtype=HALF), torch.randint(0, 1000, (128,))
    return transformers.ViTForImageClassification(config).to(HALF), (), {"pixel_values": images, "labels": labels}


def dit_xl() -> Made:
    """Peebles and Xie 2023: DiT-XL's blocks, 1152 wide, 16 heads; 32 images of 256 patches."""
    model = modules.DiT(1152, LAYERS, 16).to(HALF)
    patches, condition, target = (torch.randn(*s, dtype=HALF) for s in ((32, 256, 1152), (32, 1152), (32, 256, 1152)))
    return model, (patches, condition, target), {}


def resnet50() -> Made:
    """He et al. 2016: 64 images of 224 x 224."""
    model = transformers.ResNetForImageClassification(transformers.ResNetConfig(num_labels=1000)).to(HALF)
    images, labels = torch.randn(64, 3, 224, 224, dtype=HALF), torch.randint(0, 1000, (64,))
    return model, (), {"pixel_values": images, "labels": labels}


def t5_base() -> Made:
    """Raffel et al. 2020: 768 wide, 12 heads; 16 pairs of sequences of 512."""
    config = transformers.T5Config(
        d_model=768, d_ff=3072, num_layers=LAYERS, num_heads=12, decoder_start_token_id=0, vocab_size=32_128
    )
    tokens = _tokens(config.vocab_size, 16, 512)
    model = transformers.T5ForConditionalGeneration(config).to(HALF)
    return model, (), {"input_ids": tokens, "labels": tokens, "use_cache": False}


MODELS: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry(bert_base, transformer=True),
        Entry(gpt2_small, transformer=True),
        Entry(llama_1b, transformer=True),
        Entry(vit_base, transformer=True),
        Entry(dit_xl, transformer=True),
        Entry(resnet50),
        Entry(t5_base, transformer=True),
    )
}
