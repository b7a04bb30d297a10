"""A policy with a score head: a cost or reward model in training, and the sequence classifier that it becomes; or the
critics of a policy gradient.

Shape legend: B texts, T positions, H hidden.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stepwise.classifier import CHAT, COMPARISON, TEMPLATE, end_logits
from stepwise.errors import ModelError
from stepwise.policy import Policy

HEAD_WEIGHTS = "score_head.safetensors"


class ScoredPolicy:
    """The top adapter of a policy and a linear head on its last hidden states, `outputs` numbers each; both train.

    The head starts at zero: before the first update every score is exactly 0.
    """

    def __init__(self, policy: Policy, outputs: int = 1) -> None:
        self.policy = policy
        hidden = policy.head.weight.shape[1]
        self.head = nn.Linear(hidden, outputs, bias=False, device=policy.device)  # fp32, as adapters are
        nn.init.zeros_(self.head.weight)

    @property
    def names(self) -> list[str]:
        """The adapters, the top one last."""
        return self.policy.names

    def scores(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """One score per text (B,): w . h at the last position of its mask."""
        hidden_BTH = self.policy.hidden(input_ids, attention_mask)
        return end_logits(hidden_BTH.float(), attention_mask, self.head)[:, 0]

    def save_adapter(self, name: str, folder: Path) -> None:
        """Write the adapter and the head."""
        self.policy.save_adapter(name, folder)
        save_file({"weight": self.head.weight.detach().cpu().contiguous()}, folder / HEAD_WEIGHTS)

    def load_weights(self, name: str, folder: Path) -> None:
        """Overwrite adapter and head with what `save_adapter` wrote."""
        self.policy.load_weights(name, folder)
        self.head.load_state_dict(load_file(folder / HEAD_WEIGHTS))

    def export(self, folder: Path, *, label: str, template: str | None, comparison: str | None = None) -> None:
        """Write a sequence classifier with one label in Hugging Face's form: adapters merged, in the base's dtype.

        `stepwise.classifier.load_classifier` and `AutoModelForSequenceClassification` read it. `template` is that of
        the recipe: a text with {prompt}, CHAT, or None for prompt and completion in a row; it is kept in config.json.
        So is `comparison`, how two responses are one completion, of a model that compares them.
        Padding gets an id other than the end token's, because transformers finds the end of a text by it.

        Raises `ModelError` for an architecture that transformers has no sequence classifier for.
        """
        from transformers import AutoModelForSequenceClassification

        policy, tokenizer = self.policy, copy.deepcopy(self.policy.tokenizer)
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(_padding(policy))
        config = copy.deepcopy(policy.model.config)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        config.num_labels = 1
        config.id2label, config.label2id = {0: label}, {label: 0}
        config.get_text_config().pad_token_id = tokenizer.pad_token_id
        end = tokenizer.convert_ids_to_tokens(policy.eos_id)
        setattr(config, TEMPLATE, CHAT if template == CHAT else f"{template or '{prompt}'}{{completion}}{end}")
        if comparison is not None:
            setattr(config, COMPARISON, comparison)
        try:
            with torch.device("meta"):
                classes: Any = AutoModelForSequenceClassification
                model = classes.from_config(config, dtype=policy.dtype)
        except ValueError as error:
            reason = str(error).partition("\n")[0]
            raise ModelError(
                f"This architecture has no sequence classifier: {reason}",
                where="model.base",
                wanted="an architecture that transformers has a sequence classifier for",
            ) from error
        decoder = f"{model.base_model_prefix}."
        state = {name: weight.to(policy.dtype) for name, weight in policy.merged() if name.startswith(decoder)}
        state["score.weight"] = self.head.weight.detach().cpu().to(policy.dtype)
        _check_fits(model, state)
        model.save_pretrained(folder, state_dict=state)
        tokenizer.save_pretrained(folder)


def _padding(policy: Policy) -> int:
    """The tokenizer's own, unless that is the end token; then any other id."""
    tokenizer = policy.tokenizer
    candidates = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, 0, 1)
    return next(int(i) for i in candidates if i is not None and i != policy.eos_id)


def _check_fits(model: Any, state: dict[str, Tensor]) -> None:
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if wanted != found:
        differing = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        raise ModelError(
            f"The weights do not fit {type(model).__name__}",
            where=differing[0],
            got=found.get(differing[0], "no such weight"),
            wanted=wanted.get(differing[0], "no such weight"),
        )
