"""Policy gradient with trajectories weighted by risk: RA-RLHF (2501.06911), whose risk-neutral end is PPO-RLHF.

| trajectories that count                     | is                                            |
|---------------------------------------------|-----------------------------------------------|
| select_tail, risk_schedule with alpha = 1   | PPO-RLHF                                      |
| select_tail, risk_schedule with alpha < 1   | RA-RLHF: the worst B0 of a batch, B0 falling  |
| trajectory_weights, CVaR                    | RA-RLHF at once, the boundary episode split   |
| trajectory_weights, Entropic / EVaR         | all episodes, the bad ones more               |
| all, with lagrangian_advantage              | PPO-Lagrangian, Safe RLHF (2310.12773)        |

Where this deviates from the paper and from the code released with it:

* Episodes are ranked by the Monte-Carlo return of the paper's text, not by the critic-driven lambda-return of the code,
  which is an option, read at each episode's own first token.
* Exactly B0 episodes are kept, ties broken by their index; the code keeps all that tie.
* The KL controller sees the mean over kept episodes. The code divides their sum by B, so that a target of 6 holds the
  kept episodes to 6 B / B0.
* Kept episodes are gathered before they are split into mini-batches: none is without a token.
* The critic's loss is squared (printed without the square in eq. 13), and a mini-batch whose ratio runs away is limited
  by the norm of its gradient, not zeroed.
* The value head has no dropout and starts at zero; policy and reference share all weights but the top adapter.

Shape legend: B episodes, T response positions (the first token at 0, padding on the right), N response tokens of all
episodes of a batch in a row, K critics: that of the reward, then one per cost. A return is larger the better; the tail
is the lower one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from stepwise.collate import IGNORED, text_batch
from stepwise.errors import ConfigError, NonFiniteError
from stepwise.log_probs import log_probs
from stepwise.methods.supervised import Supervised
from stepwise.risk import RiskMeasure
from stepwise.scored_policy import ScoredPolicy
from stepwise.train import Batch, Outcome

RankBy = Literal["mc_kl", "score", "lambda_return"]
Whiten = Literal["kept", "batch", "none"]

_ROUNDING = 1e-9  # what a product such as 0.2 * 5 may lie above the whole number it stands for
_SMALL = 1e-8


# --- which trajectories count ----------------------------------------------------------------------------------------


def risk_schedule(iteration: int, *, batch: int, alpha: float, warmup: int, rho: float, iterations: int) -> int:
    """B0, how many of the `batch` episodes of an iteration count.                          [2501.06911 eq. 8-10]

        c = ceil(rho M),   K = (1 - alpha) / (c - n)
        B0 = B  up to m = n;   ceil(B max(alpha, 1 - K (m - n)))  between;   ceil(alpha B)  from m = c on

    m: `iteration`, from 0; M: `iterations`; n: `warmup`; rho: share of M at which alpha is reached. Never below 1.
    Raises `ConfigError` when the batch is smaller than 2, alpha or rho is outside (0, 1], or n >= c.
    """
    end = math.ceil(rho * iterations - _ROUNDING)
    if batch < 2:
        raise ConfigError("A tail needs a batch to be the tail of", where="batch", got=batch, wanted="at least 2")
    if not 0 < alpha <= 1 or not 0 < rho <= 1:
        got = f"alpha {alpha}, rho {rho}"
        raise ConfigError("A share of the schedule is out of range", where="risk_schedule", got=got, wanted="(0, 1]")
    if not 0 <= warmup < end:
        raise ConfigError(
            "The schedule of the tail ends before it begins: alpha would never be approached",
            where="risk_schedule",
            got=f"warmup {warmup}, alpha reached at ceil({rho:g} * {iterations}) = {end}",
            wanted="a shorter warmup, or more iterations",
        )
    share = 1 - (1 - alpha) * min(max((iteration - warmup) / (end - warmup), 0.0), 1.0)
    return max(1, math.ceil(batch * max(alpha, share) - _ROUNDING))


def select_tail(return_B: Tensor, size: int) -> Tensor:
    """Indices of the `size` lowest returns, ascending; of equal returns those with the lower index.

    Raises `NonFiniteError` when a return is not finite.
    """
    _check_finite(return_B)
    return torch.sort(return_B, stable=True).indices[:size].sort().values


def trajectory_weights(return_B: Tensor, risk: RiskMeasure) -> Tensor:
    """w_i = n q*_i, q* the tilt of `risk` over the n equally likely episodes of the last axis by x = -return.

    The mean of the weights is 1; their direction is the gradient of the risk. A leading axis holds prompts, where the
    risk is over the samples of each. Raises `NonFiniteError` when a return is not finite.
    """
    _check_finite(return_B)
    return risk.tilt(-return_B, torch.zeros_like(return_B)).exp() * return_B.shape[-1]


def _check_finite(return_B: Tensor) -> None:
    bad = (~torch.isfinite(return_B)).flatten().nonzero().flatten().tolist()
    if bad:
        raise NonFiniteError(
            "A return is not finite; the weights are unchanged",
            where=f"episodes {bad[:10]}",
            wanted="finite rewards; probe the reward model, or lower the learning rate",
        )


# --- returns and advantages ------------------------------------------------------------------------------------------


def token_rewards(log_ratio_BT: Tensor, score_B: Tensor, mask_BT: Tensor, *, beta: float) -> Tensor:
    """r_t = -beta log(pi / ref)_t + score [t is the last token], 0 on padding, (B, T).

    The one-sample estimate of the KL, not clipped; every episode has at least one token.
    """
    reward_BT = -beta * log_ratio_BT * mask_BT
    last_B1 = mask_BT.long().sum(-1, keepdim=True) - 1
    return reward_BT.scatter_add(-1, last_B1, score_B[:, None].to(reward_BT.dtype))


def regularised_return(log_ratio_BT: Tensor, score_B: Tensor, mask_BT: Tensor, *, beta: float) -> Tensor:
    """R = score - beta sum_t log(pi / ref)_t, the Monte-Carlo return that RA-RLHF is risk-averse about, (B,)."""
    return score_B - beta * (log_ratio_BT * mask_BT).sum(-1)


def gae(
    reward_BT: Tensor, value_BT: Tensor, mask_BT: Tensor, *, lam: float, gamma: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and the returns that the critic learns, both (B, T), 0 on padding.

        d_t = r_t + gamma V_{t+1} - V_t,   A_t = d_t + gamma lam A_{t+1},   ret_t = A_t + V_t          [1506.02438]

    The value after the last token is 0, whether the response ended or was cut. lam = 1 makes ret_0 the sum of rewards.
    """
    reward_BT, value_BT = reward_BT * mask_BT, value_BT * mask_BT
    advantage_BT = torch.zeros_like(value_BT)
    following_B, value_after_B = torch.zeros_like(value_BT[:, 0]), torch.zeros_like(value_BT[:, 0])
    for t in reversed(range(value_BT.shape[1])):
        following_B = reward_BT[:, t] + gamma * value_after_B - value_BT[:, t] + gamma * lam * following_B
        advantage_BT[:, t], value_after_B = following_B, value_BT[:, t]
    return advantage_BT * mask_BT, (advantage_BT + value_BT) * mask_BT


def rloo(return_B: Tensor, samples: int) -> Tensor:
    """Return minus the mean return of the other samples of the same prompt, (B,): REINFORCE leave-one-out.

        A_i = R_i - sum_{j != i} R_j / (g - 1)                                          [2402.14740]

    The `samples` = g episodes of a prompt stand in a row, g >= 2. The baseline does not depend on episode i, so the
    gradient of sum_i A_i log pi(y_i) stays unbiased.
    """
    group_PG = return_B.view(-1, samples)
    others_PG = (group_PG.sum(-1, keepdim=True) - group_PG) / (samples - 1)
    return (group_PG - others_PG).flatten()


def lagrangian_advantage(advantage_BTK: Tensor, lambdas: Sequence[float], weight_BC: Tensor | None = None) -> Tensor:
    """A = (A_reward - sum_c lambda_c w_c A_cost_c) / (1 + sum_c lambda_c), (B, T).            [2310.12773]

    The first of the K advantages is that of the reward, the others those of the costs, in the order of `lambdas`.
    `weight_BC`: n q*, the tilt of each constraint's risk over the episodes (None: 1, the mean).
    """
    total_BT = advantage_BTK[..., 0].clone()
    for c, price in enumerate(lambdas):
        cost_BT = advantage_BTK[..., c + 1]
        total_BT -= price * (cost_BT if weight_BC is None else weight_BC[:, c, None] * cost_BT)
    return total_BT / (1 + math.fsum(lambdas))


def whiten(values_N: Tensor, over_N: Tensor) -> Tensor:
    """(A - mean) / sqrt(var + 1e-8), mean and unbiased variance those of `over_N`; one value alone becomes its
    distance to the mean."""
    variance = over_N.var() if len(over_N) > 1 else over_N.new_ones(())
    return (values_N - over_N.mean()) * torch.rsqrt(variance + _SMALL)


# --- the loss --------------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """What actor and critics say of each token: log pi of it (N,), and the values before it, (N,) or (N, K)."""

    log_prob: Tensor
    value: Tensor


class PpoLoss(NamedTuple):
    """Per token: the clipped losses of actor (N,) and critics (as the values), and the ratio pi / pi_old (N,)."""

    policy: Tensor
    value: Tensor
    ratio: Tensor


def ppo_loss(new: Step, old: Step, advantage_N: Tensor, return_N: Tensor, *, clip: float, clip_value: float) -> PpoLoss:
    """Clipped surrogate and clipped value loss, one value per token.                         [1707.06347 eq. 7]

        policy = max(-A ratio, -A clip(ratio, 1 - clip, 1 + clip)),   ratio = exp(log pi - log pi_old)
        value  = max((V - ret)^2, (clip(V, V_old -+ clip_value) - ret)^2) / 2

    `old`, advantages (N,) and returns (as the values) are constants of the iteration. The clipped value loss is not in
    the paper but in the code of its authors.
    """
    ratio_N = torch.exp(new.log_prob - old.log_prob)
    policy_N = torch.maximum(-advantage_N * ratio_N, -advantage_N * ratio_N.clamp(1 - clip, 1 + clip))
    near_N = torch.clamp(new.value, old.value - clip_value, old.value + clip_value)
    value_N = 0.5 * torch.maximum((new.value - return_N) ** 2, (near_N - return_N) ** 2)
    return PpoLoss(policy_N, value_N, ratio_N)


class KLController:
    """beta <- beta (1 + clip(KL / target - 1, -0.2, 0.2) B / horizon), after every iteration.    [1909.08593 sec. 2.2]

    KL in nats per episode, its mean over the B0 kept ones; B the episodes of an iteration.
    """

    def __init__(self, beta: float, *, target: float, horizon: float) -> None:
        self.beta, self.target, self.horizon = beta, target, horizon

    def update(self, kl: float, *, batch: int) -> None:
        """Raises `NonFiniteError` when the KL is not finite."""
        if not math.isfinite(kl):
            raise NonFiniteError(
                "The KL of an iteration is not finite",
                where="KLController",
                got=kl,
                wanted="a policy that can be told from its reference by finite numbers; lower the learning rate",
            )
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.beta *= 1 + error * batch / self.horizon

    def state_dict(self) -> dict[str, float]:
        """All that moves."""
        return {"beta": self.beta}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Take it up again."""
        self.beta = state["beta"]


# --- the objective ---------------------------------------------------------------------------------------------------


class Ppo(nn.Module):
    """Sum over response tokens of  weight * [ policy loss + value_weight * sum of the critics' value losses ].

    `scored` is the policy with its value head: each critic is a linear map of the policy's own last hidden states, so
    the value loss trains the adapter too, as in the paper. With `value_weight` 0 the head stays as it is.
    """

    def __init__(self, scored: ScoredPolicy, *, clip: float, clip_value: float, value_weight: float) -> None:
        super().__init__()
        self.module, self.value_head = scored.policy.module, scored.head
        self.scored, self.clip, self.clip_value, self.value_weight = scored, clip, clip_value, value_weight

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        log_prob: Tensor,
        value: Tensor,
        advantage: Tensor,
        returns: Tensor,
        weight: Tensor,
    ) -> Outcome:
        """Batches are those of `batches`; the loss is a sum over tokens, the metrics are per token."""
        new = actor_critic(self.scored, input_ids, attention_mask, labels)
        old = Step(log_prob, value)
        loss = ppo_loss(new, old, advantage, returns, clip=self.clip, clip_value=self.clip_value)
        loss_N = weight * (loss.policy + self.value_weight * loss.value.sum(-1))
        ratio = loss.ratio.detach()
        metrics = {
            "loss": loss_N,
            "loss/policy": loss.policy,
            "loss/value": loss.value.sum(-1),
            "policy/ratio": ratio,
            "policy/clip_fraction": ((ratio - 1).abs() > self.clip).float(),
            "policy/approx_kl": 0.5 * (new.log_prob.detach() - log_prob) ** 2,
            "value/error": (value[:, 0] - returns[:, 0]) ** 2,
        }
        if value.shape[1] > 1:
            metrics["value/cost_error"] = ((value - returns) ** 2)[:, 1:].mean(-1)
        return Outcome(loss_N.sum(), metrics)


class WithDemonstrations(nn.Module):
    """`Ppo`, and weight * the negative log-likelihood of one demonstration per episode (ptx, 2203.02155 eq. 2).

    The mean over the tokens of a demonstration counts as often as its episode has response tokens: then the loss per
    token is `ppo + weight * nll` whatever the lengths, and no split of a batch changes it.
    """

    def __init__(self, ppo: Ppo, *, weight: float) -> None:
        super().__init__()
        self.ppo, self.supervised, self.weight = ppo, Supervised(ppo.scored.policy), weight

    def forward(
        self, ptx_input_ids: Tensor, ptx_attention_mask: Tensor, ptx_labels: Tensor, ptx_weight: Tensor, **batch: Tensor
    ) -> Outcome:
        """Batches are those of `batches` over rows with demonstrations; `ptx_weight` is per demonstration token."""
        outcome, shown = self.ppo(**batch), self.supervised(ptx_input_ids, ptx_attention_mask, ptx_labels)
        nll_M = ptx_weight * shown.metrics["loss"]
        return Outcome(outcome.loss + self.weight * nll_M.sum(), outcome.metrics | {"loss/ptx": shown.metrics["loss"]})


def actor_critic(scored: ScoredPolicy, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Step:
    """log pi (N,) and values (N, K) of every response token of a batch (`labels` = -100 elsewhere), from one pass."""
    labels_BT = labels[:, 1:]
    keep = labels_BT != IGNORED
    hidden_NH = scored.policy.hidden(input_ids, attention_mask)[:, :-1][keep]
    log_prob_N = log_probs(hidden_NH, scored.policy.head, labels_BT[keep])
    return Step(log_prob_N, scored.head(hidden_NH.float()))


def batches(pad_id: int) -> Callable[[Sequence[Mapping[str, Any]]], Batch]:
    """A collate function over rows `{prompt_ids, response_ids, index, weight}` and, a number per response token,
    `log_prob`, `advantage`, and `value.k`, `returns.k` of every critic k; an item is a response token.

    Rows may hold a demonstration each, `ptx_prompt_ids` and `ptx_response_ids`.
    """

    def collate(rows: Sequence[Mapping[str, Any]]) -> Batch:
        batch = text_batch(rows, pad_id=pad_id)
        critics = sum(name.startswith("value.") for name in rows[0])
        steps = {name: _flat(rows, name) for name in ("log_prob", "advantage")}
        for name in ("value", "returns"):
            steps[name] = torch.stack([_flat(rows, f"{name}.{k}") for k in range(critics)], -1)
        steps["weight"] = torch.tensor([row["weight"] for row in rows for _ in row["response_ids"]])
        about = {"items": torch.tensor([len(steps["weight"])]), "rows": torch.tensor([row["index"] for row in rows])}
        return {**batch, **steps, **about, **(_demonstrations(rows, pad_id) if "ptx_response_ids" in rows[0] else {})}

    return collate


def _flat(rows: Sequence[Mapping[str, Any]], name: str) -> Tensor:
    return torch.tensor([x for row in rows for x in row[name]])


def _demonstrations(rows: Sequence[Mapping[str, Any]], pad_id: int) -> Batch:
    shown = [{"prompt_ids": row["ptx_prompt_ids"], "response_ids": row["ptx_response_ids"]} for row in rows]
    lengths = [(len(row["response_ids"]), len(row["ptx_response_ids"])) for row in rows]
    weight = torch.tensor([own / n for own, n in lengths for _ in range(n)])
    return {**{f"ptx_{name}": t for name, t in text_batch(shown, pad_id=pad_id).items()}, "ptx_weight": weight}
