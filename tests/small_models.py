"""Random causal language models of about 100,000 weights, made on the spot, with a tokenizer of 128 words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCABULARY = 128
PAD, BOS, EOS = 0, 1, 2
_IDS = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS, "vocab_size": VOCABULARY}


def words(ids: list[int]) -> str:
    """The text that the tokenizer reads as `ids`."""
    return " ".join(f"w{i}" for i in ids)


def tokenizer(size: int = VOCABULARY) -> PreTrainedTokenizerFast:
    names = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, size))]
    core = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def llama(layers: int = 2) -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=128,
            initializer_range=0.2,
            tie_word_embeddings=False,
            **_IDS,
        )
    )


def gpt2() -> PreTrainedModel:
    """Layers are `Conv1D`, and the config asks for dropout."""
    return GPT2LMHeadModel(
        GPT2Config(
            n_embd=64,
            n_layer=2,
            n_head=2,
            n_positions=128,
            initializer_range=0.2,
            resid_pdrop=0.3,
            embd_pdrop=0.3,
            attn_pdrop=0.3,
            **_IDS,
        )
    )


def gemma2() -> PreTrainedModel:
    """Logits pass through a soft-cap, small enough here to bend them."""
    return Gemma2ForCausalLM(
        Gemma2Config(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            query_pre_attn_scalar=32,
            max_position_embeddings=128,
            initializer_range=0.2,
            final_logit_softcapping=2.0,
            **_IDS,
        )
    )


def save(make: Callable[[], Any], folder: Path, *, seed: int = 0, vocabulary: int = VOCABULARY) -> Path:
    """Write a model and a tokenizer; return the folder."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        make().save_pretrained(folder)
    tokenizer(vocabulary).save_pretrained(folder)
    return folder
