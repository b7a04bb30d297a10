"""What the recipes of `options.py` name, in one folder: small random models, rows, scorers, judges, a served model."""

from __future__ import annotations

import json
import math
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import torch
from local_endpoint import chat
from small_models import BOS, EOS, PAD, VOCABULARY, llama, save, tokenizer, words
from transformers import LlamaConfig, LlamaForSequenceClassification

SCORES = '''
import math, time

def number(text):
    found = [int(word[1:]) for word in text.split() if word[1:].isdigit()]
    return sum(found) / max(1, len(found)) / 128

def high(completions, **columns):
    """Mean number of the words, 0 to 1."""
    return [number(text) for text in completions]

def varied(completions, **columns):
    """Share of different words among eight."""
    return [min(1.0, len(set(text.split())) / 8) for text in completions]

def both(prompts, completions, **columns):
    """One that is not 0 for the prompt alone."""
    return [number(p) + number(c) for p, c in zip(prompts, completions)]

def slow(completions, **columns):
    time.sleep(0.3)
    return high(completions)

def same(completions, **columns):
    return [1.0] * len(completions)

def lower(prompts, first, second, annotator=None, **columns):
    """The response of lower words wins; for the annotator `high` that of higher ones."""
    whom = annotator or [None] * len(prompts)
    gaps = [(number(b) - number(a)) * (-1 if who == "high" else 1) for a, b, who in zip(first, second, whom)]
    return [1 / (1 + math.exp(-8 * gap)) for gap in gaps]

def first(prompts, first, second, **columns):
    """The first one wins, somewhat, whatever it is."""
    return [0.7] * len(prompts)

def slow_judge(prompts, first, second, **columns):
    time.sleep(0.3)
    return lower(prompts, first, second)
'''


def row(i: int) -> dict[str, Any]:
    """A row that every format can read; lengths of prompts from 1 to 6, of completions from 2 to 6 words."""
    chosen, rejected = words([40 + i, 41, 9][: 1 + i % 3]), words([60 + i, 61, 80 + 3 * i, 5])
    return {
        "prompt": words([3 + i, 4 + i, 9, 10, 11, 12][: 1 + i % 6]) + " ",
        "completion": words([20 + i, 30, 31, 32, 33, 34][: 2 + i % 5]),
        "second": words([70 + i, 71]),
        "text": words([100 + i, 90, 91]),
        "chosen": chosen,
        "rejected": rejected,
        "response_0": chosen,
        "response_1": rejected,
        "better_response_id": i % 2,
        "safer_response_id": i // 2 % 2,
        "is_chosen_safe": i % 4 > 0,
        "is_rejected_safe": i % 4 > 1,
        "label": i % 2,
        "stratum": "ab"[i % 2],
        "group": "uvw"[i % 3],
        "who": "xy"[i // 2 % 2],
        "cost": i * i / 10,
        "cost2": -i / 10,
    }


def build(folder: Path) -> None:
    """Everything but the served model."""
    for name, seed in {"base": 0, "base2": 1}.items():
        save(llama, folder / name, seed=seed)
    _hub(folder)
    labels = {"fine": 0, "toxic": 1, "rude": 2}
    kept = {"comparison_template": " {first} w7 {second}", "score_template": "{prompt}{completion}"}
    for end, seed in {"": 0, "2": 1}.items():
        _classifier(folder / f"toxic{end}", {}, seed=seed, id2label={i: n for n, i in labels.items()}, label2id=labels)
        _classifier(folder / f"compares{end}", kept, seed=seed, num_labels=1)
    rows = [row(i) for i in range(12)]
    _write(folder / "rows.jsonl", rows)
    _write(folder / "rows2.jsonl", [row(i + 13) for i in range(12)])
    _write(folder / "broken.jsonl", [*rows, {"prompt": 3}])
    for name, part in {"train": rows[:8], "test": rows[4:], "sub/train": rows[2:10]}.items():
        _write(folder / "parts" / f"{name}.jsonl", part)
    (folder / "scores.py").write_text(SCORES)
    (folder / "words.csv").write_text("".join(f"w{i},{i / 100}\n" for i in range(3, 128)))
    (folder / "words2.csv").write_text("".join(f"w{i},{(i % 7) / 10}\n" for i in range(3, 128)))


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _hub(folder: Path) -> None:
    """A model in the cache of the hub, in two revisions."""
    place = Path(os.environ["HF_HUB_CACHE"]) / "models--small--llama"
    for branch, (commit, source) in {"main": ("0" * 40, "base"), "later": ("1" * 40, "base2")}.items():
        shutil.copytree(folder / source, place / "snapshots" / commit)
        (place / "refs").mkdir(exist_ok=True)
        (place / "refs" / branch).write_text(commit)


def _classifier(folder: Path, kept: dict[str, str], *, seed: int, **more: Any) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS, "vocab_size": VOCABULARY}
    config = LlamaConfig(max_position_embeddings=128, initializer_range=0.2, **sizes, **ids, **more)
    for key, value in kept.items():
        setattr(config, key, value)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)


class Questions:
    """What the served model answers: numbers and verdicts that follow from the question.

    Model `slow` takes 0.3 s; `busy` refuses every question once with status 503.
    """

    def __init__(self) -> None:
        self.lock, self.refused = threading.Lock(), set[str]()

    def reply(self, body: dict[str, Any]) -> tuple[int, dict[str, Any], dict[str, str]]:
        question = body["messages"][0]["content"]
        with self.lock:
            busy = body["model"] == "busy" and question not in self.refused
            self.refused.add(question)
        time.sleep(0.3 if body["model"] == "slow" else 0.03)
        if busy:
            return 503, {}, {}
        # The answer follows from the question, so that nothing depends on the order of the requests.
        total = sum(i * int(word[1:]) for i, word in enumerate(question.split(), 1) if word[1:].isdigit())
        said = f"Score: {total % 10} Second: {total % 7} Verdict: {'AB'[total % 2]} Or: {'CD'[total % 3 > 0]}"
        answer = chat(said)
        if body.get("logprobs"):
            tokens = [_token(f"{word} ", total % 5 / 10) for word in said.split(" ")]
            answer["choices"][0]["logprobs"] = {"content": tokens}
        return 200, answer, {}


def _token(word: str, other: float) -> dict[str, Any]:
    """A word of an answer, which could also have been B, with some probability."""
    tops = {word: 1 - other, "B " if word != "B " else "A ": other + 1e-9}
    return {"token": word, "top_logprobs": [{"token": t, "logprob": math.log(p)} for t, p in tops.items()]}
