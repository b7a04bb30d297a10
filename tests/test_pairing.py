"""Pairs from a policy's own responses: the better one wins, and only the score decides."""

import json
from pathlib import Path

import pytest
import torch
from small_models import llama, tokenizer

from stepwise.errors import DataError
from stepwise.pairing import read_pairs, sample_pairs, write_pairs
from stepwise.policy import Policy
from stepwise.sampling import Decoding, Prompts, sample

PROMPTS = Prompts(["w5", "w6", "w7"], [[1, 5], [1, 6], [1, 7]], {"stratum": ["a", "b", "a"]})
DECODING = Decoding(24, seed=3)
SAMPLES = 8


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    folder: Path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    llama().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return Policy.load(str(folder), quantization="none", dtype=torch.float32)


def words(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """How many different words a completion has."""
    return [float(len(set(text.split()))) for text in completions]


def parity(prompts: list[str], completions: list[str], **columns: object) -> list[float | None]:
    """0 or 1, and no judgement of very short texts: many ties."""
    return [None if len(text.split()) < 3 else float(len(text.split()) % 2) for text in completions]


@pytest.mark.parametrize(("prefer", "pick", "other"), [("higher", max, min), ("lower", min, max)])
def test_a_pair_is_the_best_and_the_worst_of_what_was_sampled(policy: Policy, prefer, pick, other) -> None:  # type: ignore[no-untyped-def]
    pairs = sample_pairs(policy, PROMPTS, DECODING, scorer=words, name="words", prefer=prefer, samples=SAMPLES)
    sampled = sample(policy, PROMPTS.repeat(SAMPLES).ids, DECODING)
    for index, pair in enumerate(pairs):
        texts = [policy.tokenizer.decode(r.ids, skip_special_tokens=True) for r in sampled[8 * index : 8 * index + 8]]
        scores = [len(set(text.split())) for text in texts]
        assert pair.prompt_ids == PROMPTS.ids[index]
        assert pair.chosen_score == pick(scores) == len(set(pair.chosen.split()))
        assert pair.rejected_score == other(scores) == len(set(pair.rejected.split()))
        assert pair.chosen in texts
        assert pair.rejected in texts


def test_of_equally_good_responses_the_one_nearest_in_length_is_chosen(policy: Policy) -> None:
    pairs = sample_pairs(policy, PROMPTS, DECODING, scorer=parity, name="parity", prefer="higher", samples=SAMPLES)
    sampled = sample(policy, PROMPTS.repeat(SAMPLES).ids, DECODING)
    by_prompt = {tuple(ids): sampled[8 * i : 8 * i + 8] for i, ids in enumerate(PROMPTS.ids)}
    assert pairs
    for pair in pairs:
        group = [policy.tokenizer.decode(r.ids, skip_special_tokens=True) for r in by_prompt[tuple(pair.prompt_ids)]]
        lengths = [len(r.ids) for r in by_prompt[tuple(pair.prompt_ids)]]
        winners = [
            n for text, n in zip(group, lengths, strict=True) if len(text.split()) >= 3 and len(text.split()) % 2
        ]
        wanted = len(pair.rejected_ids)
        assert abs(len(pair.chosen_ids) - wanted) == min(abs(n - wanted) for n in winners)


def test_a_margin_leaves_out_pairs_that_are_too_close(policy: Policy) -> None:
    arguments = {"scorer": words, "name": "words", "prefer": "higher", "samples": SAMPLES}
    every = sample_pairs(policy, PROMPTS, DECODING, **arguments)  # type: ignore[arg-type]
    margin = sorted(p.chosen_score - p.rejected_score for p in every)[0]
    kept = sample_pairs(policy, PROMPTS, DECODING, margin=margin, **arguments)  # type: ignore[arg-type]
    assert [p for p in every if p.chosen_score - p.rejected_score > margin] == kept
    with pytest.raises(DataError, match="No prompt gave two responses that words tells apart by more than 1000"):
        sample_pairs(policy, PROMPTS, DECODING, margin=1000.0, **arguments)  # type: ignore[arg-type]


def test_written_pairs_come_back_as_the_ids_that_were_sampled(policy: Policy, tmp_path: Path) -> None:
    pairs = sample_pairs(policy, PROMPTS, DECODING, scorer=words, name="words", prefer="higher", samples=SAMPLES)
    write_pairs(pairs, tmp_path / "pairs.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert [row["chosen"] for row in rows] == [pair.chosen for pair in pairs]
    tokens = read_pairs(tmp_path / "pairs.jsonl")
    assert tokens.field("prompt_ids") == [pair.prompt_ids for pair in pairs]
    assert tokens.field("chosen_ids") == [pair.chosen_ids for pair in pairs]
    assert tokens.field("rejected_ids") == [pair.rejected_ids for pair in pairs]
