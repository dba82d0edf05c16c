"""Tiny models of many `transformers` families, `name -> () -> (model, inputs)`, with a loss in the output.

Dropout is off and no routing depends on chance, so that one training step has one right answer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

Family = Callable[[], tuple[nn.Module, dict[str, Any]]]

VOCABULARY, HIDDEN, LAYERS, HEADS, BATCH, SEQUENCE, IMAGE = 64, 32, 2, 4, 2, 12, 16

# The names that configurations share, and those of the older ones.
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 2 * HIDDEN,
    "max_position_embeddings": 32,
}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GROUPED = {"num_key_value_heads": HEADS // 2}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
PICTURE = {"image_size": IMAGE, "patch_size": 4, "num_channels": 3}


def _tokens() -> Tensor:
    return torch.randint(3, VOCABULARY, (BATCH, SEQUENCE))


def _images() -> Tensor:
    return torch.randn(BATCH, 3, IMAGE, IMAGE)


def _causal(name: str, **config: Any) -> Family:
    def make() -> tuple[nn.Module, dict[str, Any]]:
        model = getattr(hf, f"{name}ForCausalLM" if name != "GPT2" else "GPT2LMHeadModel")(
            getattr(hf, f"{name}Config")(**TOKENS, **config)
        )
        model.loss_type = "ForCausalLM"  # unset, the model warns that it takes this one, which breaks the graph
        tokens = _tokens()
        return model, {"input_ids": tokens, "labels": tokens, "use_cache": False}

    return make


def _masked(name: str, **config: Any) -> Family:
    def make() -> tuple[nn.Module, dict[str, Any]]:
        model = getattr(hf, f"{name}ForMaskedLM")(getattr(hf, f"{name}Config")(**config))
        tokens = _tokens()
        return model, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}

    return make


def _translating(name: str, **config: Any) -> Family:
    def make() -> tuple[nn.Module, dict[str, Any]]:
        settings = getattr(hf, f"{name}Config")(**TOKENS, decoder_start_token_id=1, **config)
        tokens = _tokens()
        model = getattr(hf, f"{name}ForConditionalGeneration")(settings)
        return model, {"input_ids": tokens, "labels": tokens, "use_cache": False}

    return make


def _classifying(name: str, **config: Any) -> Family:
    def make() -> tuple[nn.Module, dict[str, Any]]:
        model = getattr(hf, f"{name}ForImageClassification")(getattr(hf, f"{name}Config")(num_labels=5, **config))
        return model, {"pixel_values": _images(), "labels": torch.randint(0, 5, (BATCH,))}

    return make


def _whisper() -> tuple[nn.Module, dict[str, Any]]:
    config = hf.WhisperConfig(
        **TOKENS,
        vocab_size=VOCABULARY,
        num_mel_bins=8,
        d_model=HIDDEN,
        encoder_layers=LAYERS,
        decoder_layers=LAYERS,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=2 * HIDDEN,
        decoder_ffn_dim=2 * HIDDEN,
        max_source_positions=16,
        max_target_positions=16,
        decoder_start_token_id=1,
        dropout=0.0,
    )
    inputs = {"input_features": torch.randn(BATCH, 8, 32), "labels": _tokens(), "use_cache": False}
    return hf.WhisperForConditionalGeneration(config), inputs


def _clip() -> tuple[nn.Module, dict[str, Any]]:
    text = {**SIZES, **TOKENS, "projection_dim": HIDDEN}
    config = hf.CLIPConfig(
        text_config=text, vision_config={**SIZES, **PICTURE, "projection_dim": HIDDEN}, projection_dim=HIDDEN
    )
    tokens = _tokens()
    tokens[:, -1] = TOKENS["eos_token_id"]
    return hf.CLIPModel(config), {"input_ids": tokens, "pixel_values": _images(), "return_loss": True}


_GPT = {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 32, "vocab_size": VOCABULARY}
_SEQ2SEQ = {
    "vocab_size": VOCABULARY,
    "d_model": HIDDEN,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": 2 * HIDDEN,
    "decoder_ffn_dim": 2 * HIDDEN,
    "max_position_embeddings": 32,
    "dropout": 0.0,
}
_T5 = {"vocab_size": VOCABULARY, "d_model": HIDDEN, "d_kv": 8, "d_ff": 2 * HIDDEN, "num_layers": LAYERS}
_STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}

FAMILIES: dict[str, Family] = {
    "bert": _masked("Bert", **SIZES, **NO_DROPOUT),
    "roberta": _masked("Roberta", **SIZES, **NO_DROPOUT),
    "electra": _masked("Electra", **SIZES, **NO_DROPOUT, embedding_size=16),
    "distilbert": _masked(
        "DistilBert",
        vocab_size=VOCABULARY,
        dim=HIDDEN,
        n_layers=LAYERS,
        n_heads=HEADS,
        hidden_dim=2 * HIDDEN,
        dropout=0.0,
        attention_dropout=0.0,
    ),
    "albert": _masked("Albert", **SIZES, **NO_DROPOUT, embedding_size=16),
    "modernbert": _masked("ModernBert", **SIZES, **TOKENS, cls_token_id=1, sep_token_id=2),
    "gpt2": _causal("GPT2", **_GPT, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0),
    "gpt_neox": _causal("GPTNeoX", **SIZES),
    "opt": _causal("OPT", **SIZES, ffn_dim=2 * HIDDEN, word_embed_proj_dim=HIDDEN, dropout=0.0),
    "bloom": _causal("Bloom", vocab_size=VOCABULARY, hidden_size=HIDDEN, n_layer=LAYERS, n_head=HEADS),
    "falcon": _causal("Falcon", **SIZES),
    "phi": _causal("Phi", **SIZES),
    "llama": _causal("Llama", **SIZES, **GROUPED),
    "mistral": _causal("Mistral", **SIZES, **GROUPED, sliding_window=4),
    "qwen2": _causal("Qwen2", **SIZES, **GROUPED),
    "gemma": _causal("Gemma", **SIZES, **GROUPED, head_dim=8),
    "gemma2": _causal("Gemma2", **SIZES, **GROUPED, head_dim=8),
    "mixtral": _causal(
        "Mixtral", **SIZES, **GROUPED, num_local_experts=4, num_experts_per_tok=2, experts_implementation="batched_mm"
    ),
    "mamba": _causal(
        "Mamba", vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=LAYERS, state_size=4, time_step_rank=2
    ),
    "t5": _translating("T5", **_T5, num_heads=HEADS, dropout_rate=0.0),
    "bart": _translating("Bart", **_SEQ2SEQ),
    "whisper": _whisper,
    "vit": _classifying("ViT", **{k: v for k, v in SIZES.items() if k != "vocab_size"}, **PICTURE, **NO_DROPOUT),
    "convnext": _classifying("ConvNext", **_STAGES, patch_size=2, num_channels=3),
    "resnet": _classifying("ResNet", **_STAGES, embedding_size=8, num_channels=3),
    "clip": _clip,
}
