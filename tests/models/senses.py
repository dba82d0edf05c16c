"""Tiny `transformers` families that see, hear, or read numbers over time, by kind: `name -> () -> (model, inputs)`."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from torch import nn

from .makers import (
    BATCH,
    HEADS,
    HIDDEN,
    IMAGE,
    LABELS,
    LAYERS,
    PICTURE,
    SEQUENCE,
    SIZES,
    TOKENS,
    VOCABULARY,
    WIDTHS,
    Family,
    Inputs,
    config,
    hearing,
    images,
    labels,
    pairing,
    seeing,
    segmenting,
    telling,
    tokens,
)

# fmt: off
_STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
_PYRAMID = {
    **_STAGES, "num_encoder_blocks": 4, "num_attention_heads": [1, 2, 2, 4], "mlp_ratios": [2, 2, 2, 2], "size": 32
}
_PATCHES = {**WIDTHS, "patch_size": 4}
_SWIN = {"patch_size": 2, "embed_dim": 8, "depths": [2, 1], "num_heads": [2, 4], "window_size": 4}

VISION: dict[str, Family] = {
    "vit": seeing("ViT", **_PATCHES),
    "deit": seeing("DeiT", **_PATCHES),
    "beit": seeing("Beit", **_PATCHES, use_relative_position_bias=True),
    "dinov2": seeing("Dinov2", **_PATCHES, use_swiglu_ffn=True),
    "dinov2_registers": seeing("Dinov2WithRegisters", **_PATCHES),
    "swin": seeing("Swin", **_SWIN),
    "swinv2": seeing("Swinv2", **_SWIN),
    "hiera": seeing(
        "Hiera", size=32, image_size=[32, 32], embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 4], mlp_ratio=2.0
    ),
    "levit": seeing(
        "Levit", size=32, hidden_sizes=[16, 24], num_attention_heads=[2, 3], depths=[1, 1], key_dim=[8, 8],
        mlp_ratio=[2, 2], attention_ratio=[2, 2], down_ops=[["Subsample", 8, 2, 2, 2, 2]],
    ),
    "cvt": seeing("Cvt", size=64, embed_dim=[8, 16, 24], num_heads=[1, 2, 2], depth=[1, 2, 3]),
    "pvt": seeing("Pvt", **_PYRAMID, sequence_reduction_ratios=[2, 2, 1, 1]),
    "pvt_v2": seeing("PvtV2", **_PYRAMID, sr_ratios=[2, 2, 1, 1]),
    "segformer": segmenting("Segformer", **_PYRAMID, sr_ratios=[2, 2, 1, 1], decoder_hidden_size=16),
    "poolformer": seeing("PoolFormer", size=32, **_STAGES, num_encoder_blocks=4),
    "convnext": seeing("ConvNext", **_STAGES, patch_size=2),
    "convnextv2": seeing("ConvNextV2", **_STAGES, patch_size=2),
    "resnet": seeing("ResNet", size=64, **_STAGES, embedding_size=8),
    "regnet": seeing("RegNet", size=64, **_STAGES, embedding_size=8, groups_width=4),
    "bit": seeing("Bit", size=32, **_STAGES, embedding_size=8, num_groups=2),
    "mobilenet_v1": seeing("MobileNetV1", size=64, depth_multiplier=0.25),
    "efficientnet": seeing(
        "EfficientNet", size=64, initializer_range=0.3, width_coefficient=0.25, depth_coefficient=0.3, hidden_dim=320
    ),
    "mobilenet_v2": seeing("MobileNetV2", size=64, depth_multiplier=0.25),
    "mobilevitv2": seeing("MobileViTV2", size=64, width_multiplier=0.125, n_attn_blocks=[1, 1, 1]),
    "focalnet": seeing("FocalNet", patch_size=2, embed_dim=8, depths=[1, 1], focal_levels=[2, 2], focal_windows=[3, 3]),
    "swiftformer": seeing("SwiftFormer", size=64, depths=[1, 1, 1, 1], embed_dims=[8, 16, 24, 32]),
    "textnet": seeing("TextNet", size=64, stem_out_channels=8, hidden_sizes=[8, 8, 12, 16, 16]),
}

_WAVES = {
    **WIDTHS, "conv_dim": (16, 16), "conv_stride": (4, 2), "conv_kernel": (8, 3), "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2, "apply_spec_augment": False, "classifier_proj_size": 16,
}
_ENDS = {
    "d_model": HIDDEN, "encoder_layers": LAYERS, "decoder_layers": LAYERS, "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS, "encoder_ffn_dim": 2 * HIDDEN, "decoder_ffn_dim": 2 * HIDDEN,
    "max_source_positions": 32, "max_target_positions": 32,
}
_MOONSHINE = {
    f"{end}_num_{part}": n for end in ("encoder", "decoder")
    for part, n in (("hidden_layers", 1), ("attention_heads", HEADS), ("key_value_heads", HEADS))
}


def _spectrogram() -> tuple[nn.Module, Inputs]:
    made = config(
        "AST", **_PATCHES, num_labels=LABELS, frequency_stride=4, time_stride=4, max_length=16, num_mel_bins=8
    )
    return hf.ASTForAudioClassification(made), {"input_values": torch.randn(BATCH, 16, 8), "labels": labels()}


AUDIO: dict[str, Family] = {
    "wav2vec2": hearing("Wav2Vec2", **_WAVES),
    "wav2vec2_conformer": hearing("Wav2Vec2Conformer", **_WAVES, conv_depthwise_kernel_size=3),
    "hubert": hearing("Hubert", **_WAVES),
    "wavlm": hearing("WavLM", **_WAVES, num_buckets=8, max_bucket_distance=16),
    "sew": hearing("SEW", **_WAVES),
    "sew_d": hearing("SEWD", **_WAVES, max_position_embeddings=32, position_buckets=8),
    "unispeech": hearing("UniSpeech", **_WAVES),
    "data2vec_audio": hearing("Data2VecAudio", **_WAVES, conv_pos_kernel_size=3),
    "whisper": telling("Whisper", "input_features", (8, 64), **_ENDS, num_mel_bins=8),
    "speech_to_text": telling(
        "Speech2Text", "input_features", (16, 8), **_ENDS, input_feat_per_channel=8, conv_channels=16,
        conv_kernel_sizes=[3, 3],
    ),
    "moonshine": telling(
        "Moonshine", "input_values", (2000,), **_MOONSHINE, hidden_size=HIDDEN, intermediate_size=64,
        max_position_embeddings=32,
    ),
    "ast": _spectrogram,
}

_TEXT = {**SIZES, **TOKENS, "projection_dim": HIDDEN, "project_dim": HIDDEN, "projection_size": HIDDEN}
_SIGHT = {**WIDTHS, **PICTURE, "projection_dim": HIDDEN}
_GPT = {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 32, "vocab_size": VOCABULARY}
_IMAGE_TOKEN = VOCABULARY - 1
# fmt: on


def _llava() -> tuple[nn.Module, Inputs]:
    """A decoder in whose text an image stands as tokens of its own."""
    text = {**_TEXT, "num_key_value_heads": HEADS // 2, "model_type": "llama"}
    sight = {**_SIGHT, "model_type": "clip_vision_model"}
    made = config(
        "Llava", text_config=text, vision_config=sight, image_token_index=_IMAGE_TOKEN, vision_feature_layer=-1
    )
    model = hf.LlavaForConditionalGeneration(made)
    model.loss_type = "ForCausalLM"
    picture = torch.full((BATCH, (IMAGE // PICTURE["patch_size"]) ** 2), _IMAGE_TOKEN)
    words = torch.cat([picture, torch.randint(3, _IMAGE_TOKEN, (BATCH, SEQUENCE))], dim=1)
    return model, {"input_ids": words, "pixel_values": images(), "labels": words, "use_cache": False}


def _git() -> tuple[nn.Module, Inputs]:
    words = tokens()
    model = hf.GitForCausalLM(config("Git", **SIZES, **TOKENS, vision_config=_SIGHT))
    return model, {"input_ids": words, "pixel_values": images(), "labels": words, "use_cache": False}


def _blip() -> tuple[nn.Module, Inputs]:
    text = {**_TEXT, "encoder_hidden_size": HIDDEN}
    made = config("Blip", text_config=text, vision_config=_SIGHT, projection_dim=HIDDEN, image_text_hidden_size=16)
    words = tokens()
    return hf.BlipForConditionalGeneration(made), {"input_ids": words, "pixel_values": images(), "labels": words}


def _clipseg() -> tuple[nn.Module, Inputs]:
    reduced = {"reduce_dim": 16, "extract_layers": [1], "decoder_num_attention_heads": 2}
    made = config("CLIPSeg", text_config=_TEXT, vision_config=_SIGHT, projection_dim=HIDDEN, **reduced)
    words = tokens()
    words[:, -1] = TOKENS["eos_token_id"]
    wanted = torch.rand(BATCH, IMAGE, IMAGE)
    return hf.CLIPSegForImageSegmentation(made), {"input_ids": words, "pixel_values": images(), "labels": wanted}


def _vision_encoder_decoder() -> tuple[nn.Module, Inputs]:
    ends = config("ViT", **_SIGHT), config("GPT2", **_GPT, **TOKENS, add_cross_attention=True)
    made = hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(*ends)
    made.decoder_start_token_id, made.pad_token_id = 1, 0
    return hf.VisionEncoderDecoderModel(made), {"pixel_values": images(), "labels": tokens()}


# fmt: off
MULTIMODAL: dict[str, Family] = {
    "clip": pairing("CLIP", _TEXT, _SIGHT, projection_dim=HIDDEN),
    "siglip": pairing("Siglip", _TEXT, _SIGHT),
    "altclip": pairing("AltCLIP", _TEXT, _SIGHT, projection_dim=HIDDEN),
    "align": pairing(
        "Align", _TEXT, {"image_size": 64, "width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 320},
        size=64, projection_dim=80,
    ),
    "blip": _blip,
    "git": _git,
    "clipseg": _clipseg,
    "vision_encoder_decoder": _vision_encoder_decoder,
    "llava": _llava,
}
# fmt: on


def _forecasting(name: str, **settings: Any) -> Family:
    """The next values of two series."""

    def make() -> tuple[nn.Module, Inputs]:
        made = config(name, context_length=32, prediction_length=8, num_input_channels=2, d_model=16, **settings)
        inputs = {"past_values": torch.randn(BATCH, 32, 2), "future_values": torch.randn(BATCH, 8, 2)}
        return getattr(hf, f"{name}ForPrediction")(made), inputs

    return make


SERIES: dict[str, Family] = {
    "patchtst": _forecasting("PatchTST", patch_length=4, patch_stride=4, num_hidden_layers=LAYERS, ffn_dim=32),
    "patchtsmixer": _forecasting("PatchTSMixer", patch_length=4, patch_stride=4, num_layers=LAYERS),
}
