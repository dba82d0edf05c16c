"""A Llama small enough to compile in a second or two."""

from __future__ import annotations

import transformers as hf

from tests.usage.models import HEADS, WIDTH, WORDS


def llama() -> hf.LlamaForCausalLM:
    """A Llama with random weights that never ends a text by itself."""
    config = hf.LlamaConfig(
        vocab_size=WORDS,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    return hf.LlamaForCausalLM(config)
