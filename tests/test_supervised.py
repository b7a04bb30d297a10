"""The supervised objective against transformers' own loss and a dense float64 stack."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dense_policy import adapters_of, response_log_probs
from small_models import EOS, PAD, VOCABULARY, gemma2, gpt2, llama, save
from torch import Tensor

from stepwise.methods.supervised import Supervised, batches
from stepwise.policy import Policy

RANK, SCALE = 4, 2.0
LENGTHS = [(3, 5), (1, 1), (6, 3)]  # prompt, response


def loaded(make: Any, folder: Path, *, attention: str = "sdpa") -> Policy:
    """A policy whose only adapter is far from zero."""
    policy = Policy.load(str(save(make, folder)), quantization="none", dtype=torch.float32, attention=attention)
    torch.manual_seed(1)
    policy.push("top", rank=RANK, alpha=RANK * SCALE)
    for parameter in policy.top_parameters().values():
        parameter.data.normal_(std=0.1)
    return policy


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("base")


@pytest.fixture(scope="module")
def policy(folder: Path) -> Policy:
    return loaded(llama, folder)


def rows() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(2)

    def draw(count: int) -> list[int]:
        return torch.randint(3, VOCABULARY, (count,), generator=generator).tolist()

    return [
        {"prompt_ids": draw(prompt), "response_ids": [*draw(response - 1), EOS], "index": 10 + i}
        for i, (prompt, response) in enumerate(LENGTHS)
    ]


def tensors(some_rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {name: t for name, t in batches(PAD)(some_rows).items() if name not in ("items", "rows")}


def gradient(policy: Policy, loss: Tensor) -> dict[str, Tensor]:
    return dict(zip(policy.top_parameters(), torch.autograd.grad(loss, policy.top_parameters().values()), strict=True))


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    largest = max(g.abs().max().item() for g in expected.values())
    assert largest > 0.1
    for key, value in got.items():
        torch.testing.assert_close(value.double(), expected[key].double(), rtol=1e-3, atol=1e-4 * largest)


@pytest.mark.parametrize(("make", "attention"), [(llama, "sdpa"), (gpt2, "sdpa"), (gemma2, "eager")])
def test_the_loss_is_the_models_own_times_the_tokens(make, attention, tmp_path):
    policy, batch = loaded(make, tmp_path, attention=attention), batches(PAD)(rows())
    inputs = tensors(rows())
    outcome = Supervised(policy)(**inputs)
    own = policy.model(**inputs).loss * sum(response for _, response in LENGTHS)
    assert outcome.loss.item() == pytest.approx(own.item(), rel=1e-5)
    assert_same(gradient(policy, outcome.loss), gradient(policy, own))
    assert batch["items"].tolist() == [sum(response for _, response in LENGTHS)]


def test_loss_metric_and_gradient_are_those_of_the_dense_definition(folder, policy):
    outcome = Supervised(policy)(**tensors(rows()))
    adapters = adapters_of(policy)
    nll = []
    for row in rows():
        log_pi_NV = response_log_probs(folder, adapters, row["prompt_ids"], row["response_ids"], scale=SCALE)
        nll += [-log_pi_NV[n, token] for n, token in enumerate(row["response_ids"])]
    assert outcome.metrics["loss"].tolist() == pytest.approx([x.item() for x in nll], rel=1e-4, abs=1e-5)
    assert outcome.loss.item() == pytest.approx(sum(x.item() for x in nll), rel=1e-5)
    (top,) = adapters
    expected = dict(zip(top, torch.autograd.grad(sum(nll), top.values()), strict=True))
    assert_same(gradient(policy, outcome.loss), expected)


def test_one_batch_of_all_rows_is_the_sum_of_batches_of_one(policy):
    objective = Supervised(policy)
    whole = objective(**tensors(rows()))
    single = [objective(**tensors([row])) for row in rows()]
    torch.testing.assert_close(whole.loss, torch.stack([s.loss for s in single]).sum(), rtol=1e-5, atol=1e-5)
    parts = [gradient(policy, s.loss) for s in single]
    assert_same(gradient(policy, whole.loss), {key: sum(g[key] for g in parts) for key in parts[0]})
    assert sum(batches(PAD)([row])["items"].item() for row in rows()) == batches(PAD)(rows())["items"].item()


def test_padding_of_any_id_changes_nothing(policy):
    batch = tensors(rows())
    padded = {
        "input_ids": torch.nn.functional.pad(batch["input_ids"], (0, 4)),
        "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (0, 4)),
        "labels": torch.nn.functional.pad(batch["labels"], (0, 4), value=-100),
    }
    padded["input_ids"][padded["attention_mask"] == 0] = 77
    before, after = Supervised(policy)(**batch), Supervised(policy)(**padded)
    torch.testing.assert_close(before.loss, after.loss, rtol=1e-5, atol=1e-5)
    assert_same(gradient(policy, after.loss), gradient(policy, before.loss))
