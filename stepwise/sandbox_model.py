"""A Llama of about one million parameters and its tokenizer, both trained from nothing on a list of short documents.

Small enough to train on a CPU in about a minute, shaped so that every linear layer can be held in 4 bit (widths are
multiples of 64, the block size of nf4).

Shapes: B sequences, T positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
BLOCK = 128  # positions per training row
ROWS = 8  # rows per step
LEARNING_RATE = 3e-3  # the peak of one cycle; small models want large steps


def train_tokenizer(texts: Sequence[str], *, vocab_size: int = 1024) -> PreTrainedTokenizerFast:
    """Byte-level BPE that gives the texts back exactly and puts BOS in front, as Llama's does.

    PAD, BOS and EOS are three different tokens: with PAD = EOS a classifier that pools by token id reads the wrong one.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, core.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def pack(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """All documents, each closed by EOS, cut into rows of `BLOCK` tokens, (B, T); an incomplete last row is dropped."""
    ids = [token for row in tokenizer(list(texts))["input_ids"] for token in [*row, tokenizer.eos_token_id]]
    rows = len(ids) // BLOCK
    return torch.tensor(ids[: rows * BLOCK]).view(rows, BLOCK)


def config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """About a million parameters, all matrices of a size that 4-bit blocks divide."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        initializer_range=0.05,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def pretrain(blocks_BT: Tensor, tokenizer: PreTrainedTokenizerFast, *, steps: int, seed: int) -> LlamaForCausalLM:
    """Train the model from nothing by next-token prediction in fp32; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config(tokenizer))
        order = torch.cat([torch.randperm(len(blocks_BT)) for _ in range(1 + steps * ROWS // len(blocks_BT))])
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    model.train()
    for rows in order[: steps * ROWS].view(steps, ROWS):
        batch_BT = blocks_BT[rows]
        loss = model(input_ids=batch_BT, labels=batch_BT, use_cache=False).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.generation_config = _sampling(tokenizer)
    model.eval()  # type: ignore[no-untyped-call]
    return model


def _sampling(tokenizer: PreTrainedTokenizerFast) -> GenerationConfig:
    # With top-k or top-p the samples would not come from the policy whose log-probabilities are trained.
    return GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=True,
        top_k=0,
        top_p=1.0,
        temperature=1.0,
        max_new_tokens=64,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
