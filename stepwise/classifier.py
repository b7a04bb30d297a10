"""Hugging Face sequence classifiers and published score models as scorers: a text's logit, or the probability of a
label.

Decoders with a linear head read the last token of a text. transformers finds it by the id of the padding and so reads
the token before the end where padding and end token are the same, which can turn the sign of a cost; here it is the
last position of the attention mask, which comes from lengths. Encoders run their own forward pass.

Shape legend: B texts, T positions, H hidden, L labels.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from stepwise.errors import ConfigError, ModelError
from stepwise.formats import Messages, as_messages
from stepwise.model_files import check_complete, check_shards, reading
from stepwise.policy import device
from stepwise.quantization import count_linear_4bit, cure_cpu_repacking, nf4

TEMPLATE = "score_template"  # key of config.json: the template that a model was trained with
COMPARISON = "comparison_template"  # key of config.json: how a model that compares two responses reads them as one
CHAT = "chat"  # as that: the chat template, up to the end token of the completion
HEADS = ("score", "score_head", "classifier", "pre_classifier", "classification_head")  # small, never quantised
TOKENS_ON_CPU = 1024  # of one batch: more leaves the cache, and long texts then score slower than one by one
_PROMPT, _COMPLETION = "{prompt}", "{completion}"
_BEAVER = "BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:{completion}"  # and the end token (2310.12773, its code)

Logits = Callable[[Tensor, Tensor], Tensor]  # ids (B, T), mask (B, T) -> (B, L)
Readout = Callable[[Tensor], Tensor]  # (B, L) -> (B,)


def load_classifier(
    model: str,
    *,
    revision: str | None = None,
    label: str | int | None = None,
    output: Literal["probability", "logit"] = "probability",
    template: str | None = None,
    quantization: Literal["none", "nf4"] = "none",
    batch_size: int = 32,
    max_length: int = 512,
) -> Classifier:
    """A scorer made of the sequence classifier or score model in a folder or on the hub.

    With one label a score is the raw logit; with several it is the probability of `label` (a name or an index):
    softmax, or sigmoid where the config says that labels do not exclude one another; with `output` "logit" the raw
    logit. Published score models (architectures named `...ForScore`, such as the Beaver models of Safe RLHF,
    2310.12773) give their end score, normalised where their config says so.

    `template` is a text with {completion} and mostly {prompt}; it may end with control tokens such as `</s>`, and what
    the tokenizer adds to a text (BOS, [CLS]) is added. None: the template the model was saved with, the one of
    published score models, the tokenizer's chat template, or both texts in a row. Weights are fp32 on a CPU and bf16 on
    a GPU. Only safetensors are read, and no code of a model is run.

    Raises:
        ModelError: the model cannot be loaded, has no trained head, or has no such label.
        ConfigError: the template does not hold the completion once, or has control tokens before its end.
    """
    from transformers import AutoConfig, AutoTokenizer

    with _reading(model):
        check_shards(model, revision)
        config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(model, revision=revision, trust_remote_code=False)
    published = any(name.endswith("ForScore") for name in config.architectures or ())
    load = _score_model if published else _sequence_classifier
    network, logits, names = load(model, revision=revision, quantization=quantization)
    readout = _normaliser(model, revision, config) if published else _of_label(model, names, label, config, output)
    own = getattr(config, TEMPLATE, None) or (f"{_BEAVER}{tokenizer.eos_token or ''}" if published else None)
    limits = [max_length, tokenizer.model_max_length, getattr(config, "max_position_embeddings", None)]
    return Classifier(
        logits,
        readout,
        TextReader.of(tokenizer, template or own, max_length=min(n for n in limits if n and n > 1)),
        device=next(network.parameters()).device,
        batch_size=batch_size,
        comparison=getattr(config, COMPARISON, None),
    )


class Classifier:
    """A `Scorer` that reads texts with a network; make one with `load_classifier`.

    A text longer than `max_length` keeps its end, where the completion stands; `truncated` counts these. A text
    without any token is not scored (None). `comparison`: how a model that compares two responses reads them as one
    completion (`stepwise.comparisons`), None for a model of single ones.
    """

    def __init__(
        self,
        logits: Logits,
        readout: Readout,
        reader: TextReader,
        *,
        device: torch.device,
        batch_size: int,
        comparison: str | None = None,
    ) -> None:
        self._logits, self._readout, self._reader = logits, readout, reader
        self._device, self._batch_size, self.comparison = device, batch_size, comparison
        self.truncated = 0

    @torch.inference_mode()
    def __call__(self, prompts: list[str], completions: list[str], **columns: list[Any]) -> list[float | None]:
        texts = self._reader.read(prompts, completions)
        self.truncated += sum(text.cut for text in texts)
        order = sorted((i for i, text in enumerate(texts) if text.ids), key=lambda i: len(texts[i].ids))
        scores: list[float | None] = [None] * len(texts)
        tokens = TOKENS_ON_CPU if self._device.type == "cpu" else None
        for rows in batches(order, [len(text.ids) for text in texts], size=self._batch_size, tokens=tokens):
            ids_BT, mask_BT = padded([texts[i].ids for i in rows], self._reader.pad_id)
            score_B = self._readout(self._logits(ids_BT.to(self._device), mask_BT.to(self._device)).float())
            for i, score in zip(rows, score_B.tolist(), strict=True):
                scores[i] = score
        return scores


def batches(order: Sequence[int], lengths: Sequence[int], *, size: int, tokens: int | None) -> Iterator[list[int]]:
    """The rows of `order`, shortest first, in batches of at most `size` rows and `tokens` tokens with their padding; a
    longer row is one by itself."""
    batch: list[int] = []
    for row in order:
        full = tokens is not None and (len(batch) + 1) * lengths[row] > tokens
        if batch and (full or len(batch) == size):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def padded(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, both (B, T) int64, padded on the right; the mask comes from lengths, never from ids."""
    ids_BT = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=pad_id)
    lengths_B = torch.tensor([len(row) for row in rows])
    return ids_BT, (torch.arange(ids_BT.shape[1]) < lengths_B[:, None]).long()


def end_logits(hidden_BTH: Tensor, mask_BT: Tensor, head: nn.Module) -> Tensor:
    """The head's logits (B, L) at the last position of each text that the mask holds, whichever side is padded."""
    positions_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    last_B = (positions_T * mask_BT).argmax(1)
    logits_BL: Tensor = head(hidden_BTH[torch.arange(len(last_B), device=last_B.device), last_B])
    return logits_BL


# --- text to ids -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoded:
    """Ids of a text, and whether its start was cut off."""

    ids: list[int]
    cut: bool


@dataclass(frozen=True)
class TextReader:
    """Prompts and completions to ids, through a template (None: the chat template).

    Texts of a data set never become control tokens: `</s>` in a completion is four characters.
    """

    tokenizer: Any
    template: str | None
    before: list[int]  # what stands before every text, such as BOS
    after: list[int]  # what stands behind it, such as the end token
    max_length: int
    end_id: int | None = None  # where given, a rendered conversation ends with it

    @classmethod
    def of(cls, tokenizer: Any, template: str | None, *, max_length: int) -> TextReader:
        """A reader with the control tokens that the tokenizer and the end of the template ask for."""
        plain, whole = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
        start = next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
        before, after = whole[:start], whole[start + len(plain) :]
        if template == CHAT or (template is None and tokenizer.chat_template):
            end_id = tokenizer.eos_token_id if template == CHAT else None
            return cls(tokenizer, None, before, [], max_length, end_id)
        template, ends = _without_end(template or f"{_PROMPT}{_COMPLETION}", tokenizer)
        after = after if ends == after[: len(ends)] else [*after, *ends]
        return cls(tokenizer, template, before, after, max_length)

    @property
    def pad_id(self) -> int:
        """Fills the padding; any id would do, but some encoders count positions by it."""
        return self.tokenizer.pad_token_id or 0

    def read(self, prompts: Sequence[str], completions: Sequence[str]) -> list[Encoded]:
        """One per row; of a long text its end is kept, between `before` and `after`."""
        if not prompts:
            return []
        rows = [self._chat(*row) for row in zip(prompts, completions, strict=True)] if self.template is None else None
        rows = self._plain(prompts, completions) if rows is None else rows
        room = max(self.max_length - len(self.before) - len(self.after), 1)
        return [Encoded([*self.before, *ids[-room:], *self.after], len(ids) > room) for ids in rows]

    def _plain(self, prompts: Sequence[str], completions: Sequence[str]) -> list[list[int]]:
        assert self.template is not None
        pieces = re.split(r"(\{prompt\}|\{completion\})", self.template)
        texts = [
            "".join({_PROMPT: prompt, _COMPLETION: completion}.get(piece, piece) for piece in pieces)
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        ids: list[list[int]] = self.tokenizer(
            texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
        )["input_ids"]
        return ids

    def _chat(self, prompt: str, completion: str) -> list[int]:
        messages = [*_conversation(prompt), {"role": "assistant", "content": completion}]
        ids: list[int] = self.tokenizer.apply_chat_template(
            messages, sanitize_control_tokens=True, return_dict=False, tokenizer_kwargs={"verbose": False}
        )
        ids = ids[len(self.before) :] if ids[: len(self.before)] == self.before else ids
        if self.end_id is None:
            return ids
        last = len(ids) - ids[::-1].index(self.end_id) if self.end_id in ids else 0
        return ids[:last] if last and not self.tokenizer.decode(ids[last:]).strip() else [*ids, self.end_id]


def _conversation(prompt: str) -> Messages:
    """A conversation is passed to scorers as JSON."""
    if prompt.startswith('[{"'):
        try:
            messages: Messages = json.loads(prompt)
        except ValueError:
            pass
        else:
            return messages
    return as_messages(prompt)


def _without_end(template: str, tokenizer: Any) -> tuple[str, list[int]]:
    """The template without the control tokens at its end, and these as ids."""
    ends: list[int] = []
    control = sorted(tokenizer.all_special_tokens, key=len, reverse=True)
    while found := next((token for token in control if template.endswith(token)), None):
        template = template.removesuffix(found)
        ends.insert(0, tokenizer.convert_tokens_to_ids(found))
    inside = [token for token in control if token in template]
    if template.count(_COMPLETION) != 1 or template.count(_PROMPT) > 1 or inside:
        raise ConfigError(
            "The template of a classifier is wrong",
            got=repr(template) + (f" with the control tokens {inside}" if inside else ""),
            wanted="one {completion}, and one {prompt} or none; control tokens only at its end",
        )
    return template, ends


# --- networks --------------------------------------------------------------------------------------------------------


def _sequence_classifier(model: str, **how: Any) -> tuple[Any, Logits, list[str]]:
    from transformers import AutoModelForSequenceClassification

    network = _load(AutoModelForSequenceClassification, model, **how)
    names = [network.config.id2label[i] for i in range(network.config.num_labels)]
    head = getattr(network, "score", None)
    if not isinstance(head, nn.Linear):  # an encoder, which pools its first token or by the mask itself
        return network, lambda ids, mask: network(input_ids=ids, attention_mask=mask).logits, names
    return network, _pooled(network.base_model, head), names


def _score_model(model: str, **how: Any) -> tuple[Any, Logits, list[str]]:
    """`...ForScore`: a decoder and `score_head`, a linear layer with bias that AutoModel knows nothing of."""
    from transformers import AutoModel

    network = _load(AutoModel, model, **how)
    weights = _tensors(model, how["revision"], "score_head.")
    weight = weights.get("weight")
    if weight is None or weight.shape[0] != 1:
        got = "no such tensor" if weight is None else f"{weight.shape[0]} scores"
        raise ModelError(
            "A score model needs one score",
            where=f"{model}, score_head.weight",
            got=got,
            wanted="a model in the layout of the published score models, with one row in its head",
        )
    head = nn.Linear(weight.shape[1], 1, bias="bias" in weights).requires_grad_(False)
    head.load_state_dict(weights)
    return network, _pooled(network, head.to(network.device)), ["score"]


def _pooled(decoder: Any, head: nn.Linear) -> Logits:
    head.float()  # a 16-bit head would round scores

    def logits(ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        hidden_BTH = decoder(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).last_hidden_state
        return end_logits(hidden_BTH.float(), mask_BT, head)

    return logits


def _load(kind: Any, model: str, *, revision: str | None, quantization: Literal["none", "nf4"]) -> Any:
    dtype = torch.bfloat16 if device().startswith("cuda") else torch.float32
    how: dict[str, Any] = {"dtype": dtype, "device_map": {"": device()}}
    if quantization == "nf4":
        how["quantization_config"] = nf4(dtype, keep=HEADS)
    with _reading(model):
        network, info = kind.from_pretrained(
            model, revision=revision, trust_remote_code=False, use_safetensors=True, output_loading_info=True, **how
        )
    check_complete(network, info["missing_keys"], where=model, wanted="a model that was trained as a classifier")
    if quantization == "nf4":
        cure_cpu_repacking(network)
        if count_linear_4bit(network) == 0:
            raise ModelError(
                f"{type(network).__name__} has no layer that can be held in 4 bits",
                where=model,
                wanted="`quantization: none`, or a classifier made of linear layers",
            )
    return network.eval()


def _reading(model: str) -> AbstractContextManager[None]:
    wanted = "a hub id, or a folder with config.json, *.safetensors and a tokenizer"
    return reading(f"The classifier {model!r}", where=model, wanted=wanted)


def _tensors(model: str, revision: str | None, prefix: str) -> dict[str, Tensor]:
    """The tensors of a model's files whose names start with `prefix`, in fp32, by the rest of their names."""
    from safetensors import safe_open
    from transformers.utils.hub import cached_file

    index = cached_file(
        model, "model.safetensors.index.json", revision=revision, _raise_exceptions_for_missing_entries=False
    )
    files = {"model.safetensors"}
    if index is not None:
        with open(index, encoding="utf-8") as handle:
            files = {file for name, file in json.load(handle)["weight_map"].items() if name.startswith(prefix)}
    found: dict[str, Tensor] = {}
    for file in files:
        with safe_open(cached_file(model, file, revision=revision), framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  not a dict
                if name.startswith(prefix):
                    found[name.removeprefix(prefix)] = tensors.get_tensor(name).float()
    return found


# --- logits to a score -----------------------------------------------------------------------------------------------


def _of_label(model: str, names: Sequence[str], label: str | int | None, config: Any, output: str) -> Readout:
    if len(names) == 1 and label is None:
        return lambda logits_BL: logits_BL[:, 0]
    known = {str(i): i for i in range(len(names))} | {name: i for i, name in enumerate(names)}
    chosen = known.get(str(label))
    if chosen is None or len(names) == 1:
        listed = ", ".join(f"{i} {name}" for i, name in enumerate(names))
        raise ModelError(
            "The score of a classifier is the probability of one of its labels, or its only logit",
            where=model,
            got="no label" if label is None else f"label {label!r}",
            wanted="no label" if len(names) == 1 else f"one of {listed}",
        )
    if output == "logit":
        return lambda logits_BL: logits_BL[:, chosen]
    if config.problem_type == "multi_label_classification":
        return lambda logits_BL: logits_BL[:, chosen].sigmoid()
    return lambda logits_BL: logits_BL.softmax(-1)[:, chosen]


def _normaliser(model: str, revision: str | None, config: Any) -> Readout:
    """What `do_normalize` of a score model asks for: (x - mean) / std for a reward; x / std for a cost, whose sign says
    safe or unsafe and must survive; std = sqrt(var) + 1e-8."""
    if not getattr(config, "do_normalize", False):
        return lambda score_B1: score_B1[:, 0]
    buffers, form = _tensors(model, revision, "normalizer."), getattr(config, "score_type", "reward")
    if form not in ("reward", "cost") or not {"mean", "var"} <= buffers.keys():
        got = f"score_type {form}, {', '.join(buffers) or 'no buffers'}"
        wanted = "score_type reward or cost, buffers normalizer.mean and normalizer.var"
        raise ModelError("The normaliser of a score model is unknown", where=model, got=got, wanted=wanted)
    mean = float(buffers["mean"]) if form == "reward" else 0.0
    std = float(buffers["var"].sqrt()) + 1e-8
    return lambda score_B1: (score_B1[:, 0] - mean) / std
