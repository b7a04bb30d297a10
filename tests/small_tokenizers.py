"""Tokenizers made on the spot: with and without BOS, with padding that equals EOS, with a chat template."""

from __future__ import annotations

from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "How are you today? I am fine, thank you.",
    "hello there, why yes, no, yesterday",
    "user assistant system",
] * 5
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    "<|turn|>{{ m.role }}\n{{ m.content }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)


@cache
def _trained(bos: bool, split: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<|turn|>", "<|end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if bos:
        marks = [("<s>", 1)]
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", special_tokens=marks)
    return tokenizer


def byte_level(*, bos: bool = True, split: bool = True, pad: str = "</s>") -> PreTrainedTokenizerFast:
    """A byte-level BPE; `split` keeps words apart, without it tokens may reach over the end of a prompt."""
    return PreTrainedTokenizerFast(
        tokenizer_object=_trained(bos, split), bos_token="<s>" if bos else None, eos_token="</s>", pad_token=pad
    )


def chat() -> PreTrainedTokenizerFast:
    """As above, with turns that end in `<|end|>` (its EOS) and a line break, and no system role."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_trained(True, True),
        bos_token="<s>",
        eos_token="<|end|>",
        pad_token="<pad>",
        additional_special_tokens=["<|turn|>", "</s>"],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
