"""Weights of strata: which way they move, what they scale, what they refuse."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from scipy.special import softmax

from stepwise.errors import DataError
from stepwise.game_parts import scale_of
from stepwise.game_strata import StrataScale
from stepwise.recipe_games import Strata
from stepwise.risk import CVaR, Entropic
from stepwise.strata import each

NAMES = ["a", "a", "b", "b", "b", "c"]


def test_weights_rest_until_every_stratum_was_seen_and_then_follow_the_tilt() -> None:
    scale = StrataScale(Entropic(10.0), NAMES, [float("nan")] * 6, gain=0.5)
    mass = np.array([2, 3, 1]) / 6
    scale.observe(torch.tensor([0, 3]), torch.tensor([0.4, 0.6]))
    scale.after_step(1)
    assert scale.weight_E.tolist() == pytest.approx(mass) and scale.of(torch.arange(6)).tolist() == [1.0] * 6
    assert "value/c" not in scale.numbers()
    again = StrataScale(Entropic(10.0), NAMES, [float("nan")] * 6, gain=0.5)
    again.load_state_dict(json.loads(json.dumps(scale.state_dict())))
    for one in (scale, again):
        one.observe(torch.tensor([2, 5]), torch.tensor([0.8, 0.5]))
        one.after_step(2)
    wanted = mass + 0.5 * (softmax(np.log(mass) - 10 * np.array([0.4, 0.7, 0.5])) - mass)
    assert scale.weight_E.tolist() == again.weight_E.tolist() == pytest.approx(wanted)
    assert scale.of(torch.tensor([5])).item() == pytest.approx(wanted[2] * 6)


def test_with_a_stratum_for_every_prompt_the_loss_is_that_of_its_worst_share() -> None:
    losses = torch.tensor([3.0, 1.0, 4.0, 2.0], dtype=torch.float64)
    names = each(["p", "q", "r", "s"], stratum=["a"] * 4)
    scale = StrataScale(CVaR(0.5), names, (-losses).tolist(), gain=1.0)
    scale.after_step(1)
    kept = scale.of(torch.arange(4))
    assert kept.tolist() == pytest.approx([2, 0.1, 2, 0.1])  # never quite forgotten
    assert ((kept > 1) * kept * losses).mean().item() == pytest.approx(3.5)  # the mean of the worst half


def test_many_strata_are_not_logged() -> None:
    names = each(["p"] * 30)
    assert StrataScale(CVaR(0.5), names, [0.5] * 30, gain=1.0).numbers() == {}


@pytest.mark.parametrize(
    ("column", "acts_on", "told"),
    [
        ("kind", "targets", "a single prompt in c"),
        ("same", "loss", "only 'x'"),
        ("other", "targets", "Prompts without a stratum"),
        ("stepwise.strata:severity", "targets", "failed with TypeError"),
    ],
)
def test_strata_that_cannot_be_weighed_are_refused(column: str, acts_on: str, told: str) -> None:
    part = Strata.model_validate({"risk": {"measure": "mean"}, "column": column, "acts_on": acts_on})
    with pytest.raises(DataError, match=told):
        scale_of(part, ["p"] * 6, {"kind": NAMES, "same": ["x"] * 6}, [0.5] * 6)
