"""A small random Llama with LoRA reaches the equilibrium that the tabular game has on the same pools."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_models import llama, save

from stepwise import matrix_game
from stepwise.game_payoffs import Payoff, on_pool
from stepwise.game_strata import StrataScale
from stepwise.matrix_game import OverOpponents, OverStrata
from stepwise.methods.game import Game, batches, log_ratios, measure, response_field
from stepwise.policy import Policy
from stepwise.risk import CVaR, Entropic, Mean, RiskMeasure
from stepwise.tokens import Tokens, TokensWriter
from stepwise.train import Training, train

PROMPTS, SAMPLES, BETA = 4, 4, 0.25  # the proven range of the neutral game; far below that of the entropic one
STRATA = ["a", "a", "b", "b"]


class Quiet:
    def start(self, step: int, steps: int) -> None: ...
    def log(self, numbers: dict[str, float]) -> None: ...
    def warn(self, text: str) -> None: ...


def judged() -> np.ndarray:
    above = np.triu(np.random.default_rng(0).uniform(0.05, 0.95, (PROMPTS, SAMPLES, SAMPLES)), 1)
    return above + np.tril(1 - np.swapaxes(above, -1, -2), -1) + 0.5 * np.eye(SAMPLES)


def pool() -> Tokens:
    random = np.random.default_rng(1)
    writer = TokensWriter("prompt_ids", *map(response_field, range(SAMPLES)))
    for n, wins in enumerate(judged()):
        columns = {"wins": [wins.tolist()], "base": [0.0] * SAMPLES, "prompt": n}
        responses = [random.integers(3, 128, size=4).tolist() for _ in range(SAMPLES)]
        writer.add(n, columns, random.integers(3, 128, size=3).tolist(), *responses)
    return writer.tokens()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(lambda: llama(layers=1), tmp_path_factory.mktemp("models") / "llama")


def fresh(base: Path) -> Policy:
    """Under an adapter that does nothing yet, the same every time."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    policy = Policy.load(str(base), quantization="none", dtype=torch.float32)
    policy.push("game", rank=16, alpha=32)
    return policy


def play(base: Path, folder: Path, payoff: Payoff, scale: Any = None, *, beta: float = BETA, epochs: int = 250) -> Any:
    """omega (N, M) after training, and the numbers of the whole pool."""
    policy = fresh(base)
    objective, rows, collate = Game(policy, payoff=payoff, beta=beta, scale=scale), pool(), batches(policy.pad_id)
    training = Training(
        epochs=epochs, learning_rate=0.01, batch_size=4, micro_batch=4, warmup=0.05, save_every=0, max_grad_norm=10.0
    )
    train(
        policy,
        objective,
        rows,
        collate=collate,
        training=training,
        folder=folder,
        monitor=Quiet(),
        steering=scale,
    )
    s_NM = log_ratios(objective, rows, collate=collate, batch_size=4)
    return on_pool(torch.zeros_like(s_NM), s_NM).numpy(), measure(objective, rows, collate=collate, batch_size=4)


@pytest.mark.parametrize(("risk", "beta", "epochs"), [(Entropic(5.0), BETA, 250), (CVaR(0.5), 1.0, 120)], ids=str)
def test_the_equilibrium_of_the_pool_is_reached(
    base: Path, tmp_path: Path, risk: RiskMeasure, beta: float, epochs: int
) -> None:
    omega, numbers = play(base, tmp_path, Payoff(opponents=risk), beta=beta, epochs=epochs)
    even = np.full((PROMPTS, SAMPLES), 1 / SAMPLES)
    wanted = matrix_game.equilibrium(judged(), even, beta=beta, risk=OverOpponents(risk))
    assert wanted.converged and np.abs(wanted.policy - even).sum(-1).min() > 0.05
    distance = np.abs(omega - wanted.policy).sum(-1).max()
    assert distance <= 1e-3 and numbers["gap/max"] < 1e-6


def test_extragradient_is_two_steps_written_by_hand(base: Path, tmp_path: Path) -> None:
    """h from s against pi(s); weights and moments as before; then the step that counts, from s against pi(h)."""
    tau, rate, clip, steps = 5.0, 0.01, 0.5, 3
    policy, other = (fresh(base) for _ in range(2))
    objective, rows, collate = Game(policy, payoff=Payoff(opponents=Entropic(tau)), beta=BETA), pool(), batches(0)
    training = Training(
        epochs=steps, learning_rate=rate, batch_size=4, micro_batch=2, warmup=0, scheduler="constant", save_every=0,
        max_grad_norm=clip,
    )  # fmt: skip
    train(
        policy,
        objective,
        rows,
        collate=collate,
        training=training,
        folder=tmp_path,
        monitor=Quiet(),
        look_ahead=objective,
    )

    P = torch.from_numpy(judged())
    weights = [p for p in other.module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)

    def log_probs() -> torch.Tensor:
        found = []
        for row in rows:
            for i in range(SAMPLES):
                prompt, response = row["prompt_ids"], row[response_field(i)]
                logits = other.model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
                found.append(logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None]).sum())
        return torch.stack(found).view(PROMPTS, SAMPLES)

    def step(s: torch.Tensor, faced: torch.Tensor) -> None:
        mu = faced.double().softmax(-1)
        p = -((mu[:, None, :] * torch.exp(-tau * P)).sum(-1)).log() / tau
        d = s - (p / BETA).float()
        loss = ((d[:, :, None] - d[:, None, :]).square().sum((1, 2)) / 2 / SAMPLES).sum() / PROMPTS
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, clip)
        optimizer.step()

    reference = log_probs().detach()  # the adapter does nothing yet
    for _ in range(steps):
        kept = [w.detach().clone() for w in weights], copy.deepcopy(optimizer.state_dict())
        s = log_probs() - reference
        step(s, s.detach())
        ahead = (log_probs() - reference).detach()
        for w, before in zip(weights, kept[0], strict=True):
            w.data.copy_(before)
        optimizer.load_state_dict(kept[1])
        step(log_probs() - reference, ahead)
    mine = [p for p in policy.module.parameters() if p.requires_grad]
    assert max(w.abs().max().item() for w in mine) > 2 * rate
    for one, two in zip(mine, weights, strict=True):
        assert torch.allclose(one, two, atol=2e-5)


def test_risk_over_strata_reaches_the_optimum_against_the_reference(base: Path, tmp_path: Path) -> None:
    risk = Entropic(40.0)
    even = np.full((PROMPTS, SAMPLES), 1 / SAMPLES)
    scale = StrataScale(risk, STRATA, [0.5] * PROMPTS, gain=0.1)
    omega, numbers = play(base, tmp_path, Payoff(anchor=1.0), scale)
    game = OverStrata(risk, [0, 0, 1, 1], even)
    wanted = matrix_game.equilibrium(judged(), even, beta=BETA, risk=game)
    neutral = matrix_game.equilibrium(judged(), even, beta=BETA, risk=OverStrata(Mean(), [0, 0, 1, 1], even))
    distance = np.abs(omega - wanted.policy).sum(-1).max()
    assert wanted.converged and distance <= 1e-3
    assert np.abs(neutral.policy - wanted.policy).sum(-1).max() > 0.02
    assert numbers["weight/a"] + numbers["weight/b"] == pytest.approx(1)
