"""Tiny `transformers` families that read or write text, by kind: `name -> () -> (model, inputs)`."""

from __future__ import annotations

from .makers import (
    HEADS,
    HIDDEN,
    LAYERS,
    SIZES,
    VOCABULARY,
    Family,
    causal,
    masked,
    translating,
)

# fmt: off
GROUPED = {**SIZES, "num_key_value_heads": HEADS // 2}
_BY_HEAD = {**GROUPED, "head_dim": 8}
_DEBERTA = {**SIZES, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 8}

ENCODERS: dict[str, Family] = {
    "bert": masked("Bert", **SIZES),
    "roberta": masked("Roberta", **SIZES),
    "electra": masked("Electra", **SIZES, embedding_size=16),
    "distilbert": masked(
        "DistilBert", vocab_size=VOCABULARY, dim=HIDDEN, n_layers=LAYERS, n_heads=HEADS, hidden_dim=2 * HIDDEN
    ),
    "albert": masked("Albert", **SIZES, embedding_size=16),
    "modernbert": masked("ModernBert", **SIZES, cls_token_id=1, sep_token_id=2),
    "deberta": masked("Deberta", **_DEBERTA),
    "deberta_v2": masked("DebertaV2", **_DEBERTA, position_buckets=4, share_att_key=True),
    "mpnet": masked("MPNet", **SIZES),
    "funnel": masked(
        "Funnel", vocab_size=VOCABULARY, block_sizes=[1, 1], num_decoder_layers=1, d_model=HIDDEN, n_head=HEADS,
        d_head=8, d_inner=2 * HIDDEN,
    ),
    "fnet": masked("FNet", mask=False, **SIZES),
    "squeezebert": masked("SqueezeBert", **SIZES, embedding_size=HIDDEN),
    "convbert": masked("ConvBert", **SIZES, embedding_size=HIDDEN, conv_kernel_size=3),
    "mobilebert": masked("MobileBert", **SIZES, embedding_size=HIDDEN, intra_bottleneck_size=16),
    "roformer": masked("RoFormer", **SIZES, embedding_size=HIDDEN),
    "rembert": masked("RemBert", **SIZES, input_embedding_size=16, output_embedding_size=24),
    "esm": masked("Esm", **SIZES, mask_token_id=4, position_embedding_type="rotary", token_dropout=True),
    "xlnet": masked(
        "XLNet", "XLNetLMHeadModel", vocab_size=VOCABULARY, d_model=HIDDEN, n_layer=LAYERS, n_head=HEADS, d_inner=64
    ),
    "longformer": masked("Longformer", **SIZES, attention_window=4, sep_token_id=2),
    "big_bird": masked("BigBird", **SIZES, attention_type="original_full"),
    "ibert": masked("IBert", **SIZES),
    "yoso": masked("Yoso", **SIZES, use_expectation=True),
}

_GPT = {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 32, "vocab_size": VOCABULARY}
_GPT_NEO = {"hidden_size": HIDDEN, "num_layers": 2, "num_heads": HEADS, "max_position_embeddings": 32, "window_size": 4}

DECODERS: dict[str, Family] = {
    "gpt2": causal("GPT2", "GPT2LMHeadModel", **_GPT),
    "gpt_neox": causal("GPTNeoX", **SIZES),
    "gpt_neo": causal("GPTNeo", **_GPT_NEO, vocab_size=VOCABULARY, attention_types=[[["global", "local"], 1]]),
    "gptj": causal("GPTJ", **_GPT, rotary_dim=4),
    "gpt_bigcode": causal("GPTBigCode", **_GPT),
    "codegen": causal("CodeGen", **_GPT, rotary_dim=4),
    "opt": causal("OPT", **SIZES, ffn_dim=2 * HIDDEN, word_embed_proj_dim=HIDDEN),
    "bloom": causal("Bloom", vocab_size=VOCABULARY, hidden_size=HIDDEN, n_layer=LAYERS, n_head=HEADS),
    "falcon": causal("Falcon", **SIZES),
    "mpt": causal("Mpt", vocab_size=VOCABULARY, d_model=HIDDEN, n_heads=HEADS, n_layers=LAYERS, max_seq_len=32),
    "phi": causal("Phi", **SIZES),
    "phi3": causal("Phi3", **GROUPED),
    "llama": causal("Llama", **GROUPED),
    "mistral": causal("Mistral", **GROUPED, sliding_window=4),
    "qwen2": causal("Qwen2", **GROUPED),
    "qwen3": causal("Qwen3", **_BY_HEAD),
    "gemma": causal("Gemma", **_BY_HEAD),
    "gemma2": causal("Gemma2", **_BY_HEAD),
    "gemma3": causal(
        "Gemma3Text", **_BY_HEAD, sliding_window=4, layer_types=["sliding_attention", "full_attention"]
    ),
    "olmo": causal("Olmo", **GROUPED, clip_qkv=0.5),
    "olmo2": causal("Olmo2", **GROUPED),
    "stablelm": causal("StableLm", **GROUPED, use_parallel_residual=True, qk_layernorm=True),
    "cohere": causal("Cohere", **GROUPED, use_qk_norm=True),
    "starcoder2": causal("Starcoder2", **GROUPED),
    "granite": causal("Granite", **GROUPED, residual_multiplier=0.5),
    "glm": causal("Glm", **_BY_HEAD),
    "nemotron": causal("Nemotron", **GROUPED),
    "persimmon": causal("Persimmon", **SIZES),
    "diffllama": causal("DiffLlama", **GROUPED),
    "xglm": causal(
        "XGLM", vocab_size=VOCABULARY, d_model=HIDDEN, num_layers=LAYERS, attention_heads=HEADS, ffn_dim=64,
        max_position_embeddings=32,
    ),
    "biogpt": causal("BioGpt", **SIZES),
    "ctrl": causal("CTRL", "CTRLLMHeadModel", **_GPT, dff=2 * HIDDEN),
    "bitnet": causal("BitNet", **GROUPED),
}

_ENDS = {
    "d_model": HIDDEN, "encoder_layers": LAYERS, "decoder_layers": LAYERS, "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS, "encoder_ffn_dim": 2 * HIDDEN, "decoder_ffn_dim": 2 * HIDDEN,
    "vocab_size": VOCABULARY,
}
_BART = {**_ENDS, "max_position_embeddings": 32}
_T5 = {
    "vocab_size": VOCABULARY, "d_model": HIDDEN, "d_kv": 8, "d_ff": 2 * HIDDEN, "num_layers": LAYERS,
    "num_heads": HEADS,
}

TRANSLATORS: dict[str, Family] = {
    "t5": translating("T5", **_T5),
    "mt5": translating("MT5", **_T5),
    "umt5": translating("UMT5", **_T5),
    "bart": translating("Bart", **_BART),
    "mbart": translating("MBart", **_BART),
    "pegasus": translating("Pegasus", **_BART),
    "marian": translating("Marian", "MarianMTModel", **_BART, decoder_vocab_size=VOCABULARY),
    "m2m_100": translating("M2M100", **_BART),
    "blenderbot": translating("Blenderbot", **_BART),
    "led": translating(
        "LED", **_ENDS, max_encoder_position_embeddings=32, max_decoder_position_embeddings=32, attention_window=4
    ),
    "fsmt": translating("FSMT", **_BART, src_vocab_size=VOCABULARY, tgt_vocab_size=VOCABULARY, langs=["en", "de"]),
    "prophetnet": translating(
        "ProphetNet", vocab_size=VOCABULARY, hidden_size=HIDDEN, encoder_ffn_dim=64, decoder_ffn_dim=64,
        num_encoder_layers=1, num_decoder_layers=1, num_encoder_attention_heads=HEADS,
        num_decoder_attention_heads=HEADS, max_position_embeddings=32,
    ),
}

# Of the forms that routing has, the one whose shapes do not depend on it: a batched product over the experts chosen.
BATCHED = {"experts_implementation": "batched_mm", "num_experts_per_tok": 2}
_LOCAL = {**GROUPED, **BATCHED, "num_local_experts": 4}
_NAMED = {**GROUPED, **BATCHED, "num_experts": 4}
_ROUTED = {**BATCHED, "n_routed_experts": 4, "moe_intermediate_size": 16, "first_k_dense_replace": 1}
_LATENT = {
    **SIZES, **_ROUTED, "num_key_value_heads": HEADS, "kv_lora_rank": 8, "q_lora_rank": 16, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8, "v_head_dim": 8,
}

EXPERTS: dict[str, Family] = {
    "mixtral": causal("Mixtral", **_LOCAL),
    "qwen2_moe": causal("Qwen2Moe", **_NAMED, moe_intermediate_size=16, shared_expert_intermediate_size=24),
    "qwen3_moe": causal("Qwen3Moe", **_LOCAL, moe_intermediate_size=16, head_dim=8, norm_topk_prob=True),
    "olmoe": causal("Olmoe", **_NAMED, output_router_logits=True),
    "gpt_oss": causal("GptOss", **_LOCAL, head_dim=8, sliding_window=4),
    "granitemoe": causal("GraniteMoe", **_LOCAL),
    "deepseek_v2": causal("DeepseekV2", **_LATENT),
    "deepseek_v3": causal("DeepseekV3", **_LATENT, n_group=2, topk_group=1),
    "glm4_moe": causal("Glm4Moe", **_BY_HEAD, **_ROUTED),
    "llama4": causal(
        "Llama4Text", "Llama4ForCausalLM", **_BY_HEAD, intermediate_size_mlp=48, num_local_experts=4,
        num_experts_per_tok=1, attention_chunk_size=4,
    ),
    "jetmoe": causal("JetMoe", **_LOCAL, kv_channels=8),
    "switch": translating(
        "SwitchTransformers", **_T5, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_experts=4,
        router_jitter_noise=0.0,
    ),
    "nllb_moe": translating(
        "NllbMoe", **_BART, num_experts=4, encoder_sparse_step=2, decoder_sparse_step=2, second_expert_policy="all"
    ),
}

_MAMBA = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": LAYERS, "state_size": 4, "time_step_rank": 2,
}
_SCANNED = {
    **GROUPED, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 4, "mamba_n_groups": 1,
}
_LINEAR = ["linear_attention", "full_attention"]

RECURRENT: dict[str, Family] = {
    "mamba": causal("Mamba", **_MAMBA),
    "mamba2": causal(
        "Mamba2", vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=LAYERS, state_size=8, num_heads=8,
        head_dim=8, n_groups=2, chunk_size=4,
    ),
    "falcon_mamba": causal("FalconMamba", **_MAMBA),
    "rwkv": causal(
        "Rwkv", vocab_size=VOCABULARY, hidden_size=HIDDEN, attention_hidden_size=HIDDEN, num_hidden_layers=LAYERS,
        context_length=32,
    ),
    "recurrent_gemma": causal(
        "RecurrentGemma", **{**_BY_HEAD, "num_key_value_heads": 1}, lru_width=HIDDEN, attention_window_size=4,
        block_types=["recurrent", "attention"],
    ),
    "jamba": causal(
        "Jamba", **GROUPED, mamba_d_state=4, mamba_dt_rank=2, num_experts=2, num_experts_per_tok=1,
        experts_implementation="batched_mm", attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2,
        expert_layer_offset=1, use_mamba_kernels=False,
    ),
    "bamba": causal("Bamba", **_SCANNED, attn_layer_indices=[1]),
    "falcon_h1": causal("FalconH1", **_SCANNED, mamba_d_ssm=64),
    "zamba2": causal(
        "Zamba2", **SIZES, layers_block_type=["mamba", "hybrid"], mamba_d_state=8, n_mamba_heads=8, mamba_headdim=8,
        mamba_ngroups=1, chunk_size=4, num_mem_blocks=1, use_mamba_kernels=False,
    ),
    "granitemoehybrid": causal(
        "GraniteMoeHybrid", **_SCANNED, **BATCHED, num_local_experts=4, shared_intermediate_size=32,
        layer_types=["mamba", "attention"],
    ),
    "nemotron_h": causal(
        "NemotronH", **GROUPED, hybrid_override_pattern="M*", mamba_num_heads=8, mamba_head_dim=8, ssm_state_size=8,
        n_groups=1, chunk_size=4,
    ),
    "lfm2": causal("Lfm2", **GROUPED, layer_types=["conv", "full_attention"]),
    "qwen3_next": causal(
        "Qwen3Next", **_NAMED, head_dim=8, linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2,
        linear_num_value_heads=4, moe_intermediate_size=16, shared_expert_intermediate_size=16, layer_types=_LINEAR,
    ),
    "minimax": causal("MiniMax", **_LOCAL, head_dim=8, block_size=4, layer_types=_LINEAR),
    "xlstm": causal(
        "xLSTM", vocab_size=VOCABULARY, hidden_size=32, embedding_dim=32, num_hidden_layers=LAYERS, num_blocks=LAYERS,
        num_heads=4, chunk_size=4, mode="train",
    ),
}
