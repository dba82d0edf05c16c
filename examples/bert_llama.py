"""BERT and Llama from `transformers`, small and with random weights, trained for a few steps each.

python -m examples.bert_llama [--backend inductor] [--steps 10] [--layers 2]
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from .common import compare

VOCABULARY = 1000


def sizes(layers: int) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "intermediate_size": 512,
    }


def bert(layers: int) -> nn.Module:
    # Without dropout eager and compiled runs draw no random numbers, and their losses can be compared.
    config = transformers.BertConfig(**sizes(layers), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return transformers.BertForMaskedLM(config)


def llama(layers: int) -> nn.Module:
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**sizes(layers), num_key_value_heads=2, use_cache=False)
    )
    model.loss_type = "ForCausalLM"  # unset, the model warns that it takes this one, which breaks the graph
    return model


def loss(model: nn.Module, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens, labels=tokens).loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="minifuse")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--layers", type=int, default=2)
    options = parser.parse_args()

    for make in (bert, llama):
        torch.manual_seed(0)
        print(make.__name__)
        batches = [(torch.randint(0, VOCABULARY, (4, 64)),)] * options.steps
        compare(options.backend, make(options.layers), loss, batches)


if __name__ == "__main__":
    main()
