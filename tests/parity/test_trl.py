"""DPO as TRL computes it: the same loss, rewards and gradient on the same model, adapter and pairs, in float32.

TRL is no dependency; without it these tests are skipped. See benchmarks/requirements.txt.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import EOS, PAD, VOCABULARY, llama, save, tokenizer, words
from torch import Tensor

from stepwise.losses import rsa_loss
from stepwise.methods.preference import Preference, batches
from stepwise.policy import Policy
from stepwise.risk import Mean

trl = pytest.importorskip("trl", reason="trl is not installed (pip install -r benchmarks/requirements.txt)")

BETA, RANK = 0.3, 4
LENGTHS = [(3, 5, 2), (1, 1, 4), (6, 3, 3), (2, 9, 7)]  # prompt, chosen, rejected


def rows() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(2)

    def draw(count: int) -> list[int]:
        return torch.randint(3, VOCABULARY, (count,), generator=generator).tolist()

    return [
        {
            "prompt_ids": draw(prompt),
            "chosen_ids": [*draw(chosen - 1), EOS],
            "rejected_ids": [*draw(rejected - 1), EOS],
            "index": i,
        }
        for i, (prompt, chosen, rejected) in enumerate(LENGTHS)
    ]


def randomise(parameters: dict[str, torch.nn.Parameter]) -> None:
    """The same values for the adapters of both, which differ in name and not in order."""
    generator = torch.Generator().manual_seed(1)
    for parameter in parameters.values():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(llama, tmp_path_factory.mktemp("base"))


def ours(base: Path) -> tuple[Any, list[Tensor]]:
    policy = Policy.load(str(base), quantization="none", dtype=torch.float32)
    policy.push("top", rank=RANK, alpha=2 * RANK)
    randomise(policy.top_parameters())
    objective = Preference(policy, loss=partial(rsa_loss, beta=BETA, alpha=0.0), risk=Mean(), beta=BETA)
    batch = {name: t for name, t in batches(PAD)(rows()).items() if name not in ("items", "rows")}
    outcome = objective(**batch)
    gradients = torch.autograd.grad(outcome.loss / len(LENGTHS), list(policy.top_parameters().values()))
    return outcome, list(gradients)


def theirs(base: Path, output: Path) -> tuple[float, dict[str, list[float]], list[Tensor]]:
    """TRL's loss, what it logs, and its gradient, through its own collator and `compute_loss`."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM

    def text(row: dict[str, Any]) -> dict[str, str]:  # TRL appends EOS
        chosen, rejected = (f" {words(row[f'{side}_ids'][:-1])}" for side in ("chosen", "rejected"))
        return {"prompt": words(row["prompt_ids"]), "chosen": chosen, "rejected": rejected}

    trainer = trl.DPOTrainer(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        args=trl.DPOConfig(
            output_dir=str(output), beta=BETA, bf16=False, gradient_checkpointing=False, use_cpu=True, report_to="none"
        ),
        train_dataset=Dataset.from_list([text(row) for row in rows()]),
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    adapter = {name: p for name, p in trainer.model.named_parameters() if ".lora_" in name}
    randomise(adapter)
    for tokenised, row in zip(trainer.train_dataset, rows(), strict=True):
        assert {key: tokenised[key] for key in row if key != "index"} == {k: v for k, v in row.items() if k != "index"}
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(list(trainer.train_dataset)))
    gradients = torch.autograd.grad(loss, list(adapter.values()))
    return loss.item(), trainer._metrics["train"], list(gradients)


def test_alpha_zero_is_the_dpo_loss_of_trl(base, tmp_path):
    outcome, own_gradients = ours(base)
    loss, logged, gradients = theirs(base, tmp_path)
    assert outcome.loss.item() / len(LENGTHS) == pytest.approx(loss, abs=1e-5)
    assert abs(loss - 0.6931) > 0.05  # the adapter does something
    assert len(own_gradients) == len(gradients)
    largest = max(gradient.abs().max().item() for gradient in gradients)
    for own, gradient in zip(own_gradients, gradients, strict=True):
        torch.testing.assert_close(own, gradient, rtol=1e-4, atol=1e-5 * largest)
    for name in ("logps/chosen", "logps/rejected"):
        assert outcome.metrics[name].mean().item() == pytest.approx(logged[name][0], rel=1e-5)
    # TRL's implicit reward is beta m, ours beta (m + D); see docs/methods/rsa.md.
    for side in ("chosen", "rejected"):
        own = (outcome.metrics[f"rewards/{side}"] - BETA * outcome.metrics[f"risk/{side}"]).mean().item()
        assert own == pytest.approx(logged[f"rewards/{side}"][0], rel=1e-4, abs=1e-5)
