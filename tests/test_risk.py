"""Risk measures against their float64 definitions, a linear program, and the axioms."""

from __future__ import annotations

import itertools
import math

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stepwise.errors import ConfigError
from stepwise.quantile import SMALL, upper_tail
from stepwise.risk import CVaR, Entropic, EVaR, Mean, Mixture, RiskMeasure, WorstCase, build

MEASURES = [
    (Mean(), oracles.mean),
    (CVaR(1.0), oracles.mean),
    (CVaR(0.97), lambda x, p: oracles.cvar(x, p, 0.97)),
    (CVaR(0.1), lambda x, p: oracles.cvar(x, p, 0.1)),
    (CVaR(1e-3), lambda x, p: oracles.cvar(x, p, 1e-3)),
    (Entropic(0.01), lambda x, p: oracles.entropic(x, p, 0.01)),
    (Entropic(2.0), lambda x, p: oracles.entropic(x, p, 2.0)),
    (EVaR(0.9), lambda x, p: oracles.evar(x, p, 0.9)),
    (EVaR(0.05), lambda x, p: oracles.evar(x, p, 0.05)),
    (WorstCase(), oracles.worst_case),
    (
        Mixture([(0.25, Mean()), (0.75, CVaR(0.2))]),
        lambda x, p: 0.25 * oracles.mean(x, p) + 0.75 * oracles.cvar(x, p, 0.2),
    ),
]
NAMES = [repr(measure) for measure, _ in MEASURES]
HOMOGENEOUS = [measure for measure, _ in MEASURES if not isinstance(measure, Entropic)]
each_measure = pytest.mark.parametrize("measure", [measure for measure, _ in MEASURES], ids=NAMES)
each_measure_with_definition = pytest.mark.parametrize(("measure", "definition"), MEASURES, ids=NAMES)

# Few distinct values, so that ties are the rule; few distinct weights, zero among them.
losses = st.one_of(st.sampled_from([-2.0, 0.0, 1.0, 1.5]), st.floats(-20, 20).map(lambda v: round(v, 3)))
weights = st.one_of(st.sampled_from([0.0, 1.0, 1.0, 3.0]), st.floats(0.01, 5))


@st.composite
def lotteries(draw: st.DrawFn, count: int = 1) -> tuple[list[Tensor], Tensor]:
    """`count` losses under one common distribution, float64."""
    size = draw(st.integers(1, 7))
    weight = np.array(draw(st.lists(weights, min_size=size, max_size=size)))
    weight[draw(st.integers(0, size - 1))] += 1.0
    xs = [torch.tensor(draw(st.lists(losses, min_size=size, max_size=size)), dtype=torch.float64) for _ in range(count)]
    return xs, torch.tensor(weight / weight.sum()).log()


def random_rows(rows: int, size: int, seed: int = 0, peak: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x_NV = torch.randn(rows, size, generator=generator, dtype=torch.float64)
    return x_NV, torch.log_softmax(peak * torch.randn(rows, size, generator=generator, dtype=torch.float64), -1)


def defined(definition, x_NV: Tensor, log_p_NV: Tensor) -> np.ndarray:
    p_NV = log_p_NV.double().exp().numpy()
    return np.array([definition(x, p) for x, p in zip(x_NV.double().numpy(), p_NV, strict=True)])


# --- values -----------------------------------------------------------------------------------------------------------


@each_measure_with_definition
@settings(max_examples=60, deadline=None)
@given(lottery=lotteries())
def test_value_is_the_definition(measure, definition, lottery):
    (x,), log_p = lottery
    assert measure(x, log_p).item() == pytest.approx(definition(x.numpy(), log_p.exp().numpy()), abs=2e-7)


@settings(max_examples=60, deadline=None)
@given(lottery=lotteries(), alpha=st.floats(0.01, 1))
def test_cvar_is_the_linear_program_and_the_rockafellar_uryasev_minimum(lottery, alpha):
    (x,), log_p = lottery
    value = CVaR(alpha)(x, log_p).item()
    assert value == pytest.approx(oracles.cvar_by_program(x.numpy(), log_p.exp().numpy(), alpha), abs=1e-9)
    assert value == pytest.approx(oracles.cvar_by_minimum(x.numpy(), log_p.exp().numpy(), alpha), abs=1e-12)


@each_measure_with_definition
@pytest.mark.parametrize("peak", [0.1, 3.0, 12.0])
def test_a_vocabulary_of_128k_in_float32(measure, definition, peak):
    x_NV, log_p_NV = random_rows(1, 128_256, peak=peak)
    x_NV, log_p_NV = x_NV.float(), log_p_NV.float()
    got_N = measure(x_NV, log_p_NV).double().numpy()
    np.testing.assert_allclose(got_N, defined(definition, x_NV, log_p_NV), rtol=1e-5, atol=1e-5)


def test_the_worst_tenth_of_ten_equal_outcomes_is_the_worst_one_and_a_straddling_atom_is_split():
    x, log_p = torch.arange(10.0), torch.full((10,), 0.1).log()
    assert CVaR(0.1)(x, log_p).item() == pytest.approx(9.0)
    assert CVaR(0.25)(x, log_p).item() == pytest.approx((9 + 8 + 0.5 * 7) / 2.5)
    expected = torch.tensor([0, 0, 0, 0, 0, 0, 0, 0.2, 0.4, 0.4])
    torch.testing.assert_close(CVaR(0.25).tilt(x, log_p).exp(), expected)


# --- tilts and gradients ----------------------------------------------------------------------------------------------


@each_measure
@settings(max_examples=40, deadline=None)
@given(lottery=lotteries())
def test_tilt_is_normalised_feasible_and_attains_the_value(measure, lottery):
    (x,), log_p = lottery
    q, p = measure.tilt(x, log_p).exp(), log_p.exp()
    assert q.sum().item() == pytest.approx(1, abs=1e-12)
    kl = (q * (q / p).log()).nan_to_num(nan=0.0).sum().item()
    penalty = kl / measure.eta if isinstance(measure, Entropic) else 0.0
    assert measure(x, log_p).item() == pytest.approx((q * x).sum().item() - penalty, abs=1e-9)
    if isinstance(measure, CVaR):
        assert bool((q <= p / measure.alpha + 1e-12).all())
    if isinstance(measure, EVaR):
        assert kl <= -math.log(measure.alpha) + 1e-9


@each_measure
def test_gradient_is_the_tilt_and_passes_finite_differences(measure):
    x_NV, log_p_NV = random_rows(3, 6, seed=1)
    x_NV.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: measure(x, log_p_NV), x_NV, eps=1e-6, atol=1e-6)
    scale_N = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    (grad_NV,) = torch.autograd.grad((scale_N * measure(x_NV, log_p_NV)).sum(), x_NV)
    torch.testing.assert_close(grad_NV, scale_N[:, None] * measure.tilt(x_NV, log_p_NV).exp())


@each_measure
def test_probabilities_are_constants_and_tilts_carry_no_gradient(measure):
    x_NV, log_p_NV = random_rows(2, 5)
    x_NV.requires_grad_()
    log_p_NV.requires_grad_()
    measure(x_NV, log_p_NV).sum().backward()
    assert x_NV.grad is not None
    assert log_p_NV.grad is None
    assert not measure.tilt(x_NV, log_p_NV).requires_grad


@each_measure
@pytest.mark.parametrize("size", [5, 2 * SMALL])
def test_ties_share_in_proportion_to_p_whatever_their_order(measure, size):
    x_NV, log_p_NV = random_rows(2, size)
    x_NV = x_NV.round()
    order = torch.randperm(size, generator=torch.Generator().manual_seed(2))
    tilt_NV = measure.tilt(x_NV, log_p_NV)
    torch.testing.assert_close(measure.tilt(x_NV[:, order], log_p_NV[:, order]), tilt_NV[:, order])
    for x, density in zip(x_NV, (tilt_NV - log_p_NV).exp(), strict=True):
        for value in x.unique():
            torch.testing.assert_close(density[x == value], density[x == value][:1].expand((x == value).sum()))


@each_measure
@pytest.mark.parametrize("size", [4, 2 * SMALL])
def test_a_constant_loss_is_its_own_risk_and_leaves_p_untilted(measure, size):
    x_NV, log_p_NV = torch.full((2, size), 1.25), random_rows(2, size)[1].float()
    torch.testing.assert_close(measure(x_NV, log_p_NV), torch.full((2,), 1.25))
    torch.testing.assert_close(measure.tilt(x_NV, log_p_NV), log_p_NV, atol=2e-5, rtol=1e-5)
    assert torch.equal(measure(torch.zeros(2, size), log_p_NV), torch.zeros(2))


# --- axioms -----------------------------------------------------------------------------------------------------------


@each_measure
@settings(max_examples=40, deadline=None)
@given(lottery=lotteries(count=2), shift=st.floats(-5, 5), share=st.floats(0, 1))
def test_monotone_translation_invariant_convex_and_between_mean_and_maximum(measure, lottery, shift, share):
    (x, y), log_p = lottery
    rho_x, rho_y = measure(x, log_p), measure(y, log_p)
    assert measure(torch.maximum(x, y), log_p) >= torch.maximum(rho_x, rho_y) - 1e-9
    assert measure(x + shift, log_p).item() == pytest.approx((rho_x + shift).item(), abs=1e-9)
    assert measure(share * x + (1 - share) * y, log_p) <= share * rho_x + (1 - share) * rho_y + 1e-9
    assert Mean()(x, log_p) - 1e-9 <= rho_x <= WorstCase()(x, log_p) + 1e-9


@pytest.mark.parametrize("measure", HOMOGENEOUS, ids=repr)
@settings(max_examples=40, deadline=None)
@given(lottery=lotteries(count=2), factor=st.floats(0.1, 10))
def test_coherent_measures_scale_and_are_subadditive(measure, lottery, factor):
    (x, y), log_p = lottery
    assert measure(factor * x, log_p).item() == pytest.approx(factor * measure(x, log_p).item(), abs=1e-8)
    assert measure(x + y, log_p) <= measure(x, log_p) + measure(y, log_p) + 1e-9


@settings(max_examples=40, deadline=None)
@given(lottery=lotteries(), factor=st.floats(0.1, 10), eta=st.floats(0.01, 5))
def test_entropic_risk_scales_with_eta_instead(lottery, factor, eta):
    (x,), log_p = lottery
    scaled = Entropic(eta)(factor * x, log_p) / factor
    assert scaled.item() == pytest.approx(Entropic(factor * eta)(x, log_p).item(), abs=1e-9)


@each_measure
@settings(max_examples=30, deadline=None)
@given(lottery=lotteries())
def test_only_the_distribution_of_the_loss_counts(measure, lottery):
    (x,), log_p = lottery
    halves, half_log_p = torch.cat([x, x]), torch.cat([log_p, log_p]) - math.log(2)
    assert measure(halves, half_log_p).item() == pytest.approx(measure(x, log_p).item(), abs=1e-9)


# --- limits and order -------------------------------------------------------------------------------------------------


def test_limits_and_order_of_the_families():
    x_NV, log_p_NV = random_rows(4, 50, peak=0.5)
    mean_N, worst_N = Mean()(x_NV, log_p_NV), WorstCase()(x_NV, log_p_NV)
    assert torch.equal(CVaR(1.0)(x_NV, log_p_NV), mean_N)
    torch.testing.assert_close(EVaR(1.0)(x_NV, log_p_NV), mean_N)
    torch.testing.assert_close(EVaR(1 - 1e-12)(x_NV, log_p_NV), mean_N, atol=1e-5, rtol=0)
    torch.testing.assert_close(Entropic(1e-9)(x_NV, log_p_NV), mean_N, atol=1e-8, rtol=0)
    torch.testing.assert_close(CVaR(1e-12)(x_NV, log_p_NV), worst_N)
    torch.testing.assert_close(Entropic(1e4)(x_NV, log_p_NV), worst_N, atol=2e-3, rtol=0)
    for alpha in (0.9, 0.5, 0.1):
        cvar_N, evar_N = CVaR(alpha)(x_NV, log_p_NV), EVaR(alpha)(x_NV, log_p_NV)
        assert bool((mean_N < cvar_N).all() and (cvar_N < evar_N).all() and (evar_N <= worst_N).all())
    for small, large in itertools.pairwise((0.1, 1.0, 5.0)):
        assert bool((Entropic(small)(x_NV, log_p_NV) < Entropic(large)(x_NV, log_p_NV)).all())


def test_entropic_risk_of_small_eta_is_mean_plus_half_eta_variance():
    x_NV, log_p_NV = random_rows(4, 200)
    p_NV = log_p_NV.exp()
    mean_N = (p_NV * x_NV).sum(-1)
    variance_N = (p_NV * (x_NV - mean_N[:, None]) ** 2).sum(-1)
    for eta in (1e-2, 1e-3, 1e-4):
        expected_N = mean_N + eta / 2 * variance_N
        torch.testing.assert_close(Entropic(eta)(x_NV, log_p_NV), expected_N, atol=2 * eta**2, rtol=0)


@pytest.mark.parametrize("eta", [1e-1, 1e-3, 1e-5])
def test_small_eta_keeps_its_digits_in_float32(eta):
    x_NV, log_p_NV = random_rows(4, 32_000)
    got_N = Entropic(eta)(x_NV.float(), log_p_NV.float()).double().numpy()
    expected_N = defined(lambda x, p: oracles.entropic(x, p, eta), x_NV.float(), log_p_NV.float())
    np.testing.assert_allclose(got_N, expected_N, atol=2e-6)


def test_entropic_risk_sees_an_outcome_whose_probability_underflows_in_float32():
    x, log_p = torch.tensor([0.0, 200.0]), torch.tensor([0.0, -110.0])
    assert log_p.exp()[1] == 0
    assert Entropic(1.0)(x, log_p).item() == pytest.approx(90.0, rel=1e-6)
    assert Entropic(1.0).tilt(x, log_p)[1].item() == pytest.approx(0.0, abs=1e-6)


# --- hard inputs ------------------------------------------------------------------------------------------------------


@each_measure
@pytest.mark.parametrize("size", [4, 2 * SMALL])
@pytest.mark.parametrize("absent", [math.inf, -math.inf, math.nan, 1e30])
def test_outcomes_without_probability_do_not_count(measure, size, absent):
    x_NV, log_p_NV = random_rows(2, size)
    padded_x_NV = torch.cat([torch.full((2, 3), absent, dtype=torch.float64), x_NV], -1).requires_grad_()
    padded_log_p_NV = torch.cat([torch.full((2, 3), -math.inf, dtype=torch.float64), log_p_NV], -1)
    value_N = measure(padded_x_NV, padded_log_p_NV)
    torch.testing.assert_close(value_N.detach(), measure(x_NV, log_p_NV))
    (grad_NV,) = torch.autograd.grad(value_N.sum(), padded_x_NV)
    assert torch.equal(grad_NV[:, :3], torch.zeros(2, 3, dtype=torch.float64))
    tilt_NV = measure.tilt(padded_x_NV, padded_log_p_NV)
    assert bool(tilt_NV[:, :3].isneginf().all())
    torch.testing.assert_close(tilt_NV[:, 3:], measure.tilt(x_NV, log_p_NV))


@each_measure
def test_an_infinite_loss_with_probability_is_an_infinite_risk_without_nan(measure):
    x = torch.tensor([0.0, math.inf, 1.0, math.inf])
    log_p = torch.tensor([0.4, 0.2, 0.3, 0.1]).log()
    assert measure(x, log_p).item() == math.inf
    assert measure.tilt(x, log_p).exp().sum().item() == pytest.approx(1, abs=1e-5)
    # An infinitely good outcome is not in the tail of measures that look at the tail only.
    good = torch.tensor([0.0, -math.inf, 1.0, 2.0])
    assert not measure(good, log_p).isnan()
    assert not measure.tilt(good, log_p).isnan().any()


@each_measure
@pytest.mark.parametrize("size", [5, 2 * SMALL])
def test_a_nan_that_counts_stays_visible_in_its_row_only(measure, size):
    x_NV, log_p_NV = random_rows(2, size)
    x_NV[0, 3] = math.nan
    value_N = measure(x_NV, log_p_NV)
    assert value_N[0].isnan()
    assert value_N[1].isfinite()


@each_measure
def test_unnormalised_probabilities_are_renormalised(measure):
    x_NV, log_p_NV = random_rows(2, 6)
    torch.testing.assert_close(measure(x_NV, log_p_NV + 300.0), measure(x_NV, log_p_NV))
    assert measure.tilt(x_NV, log_p_NV - 300.0).exp().sum(-1).tolist() == pytest.approx([1, 1])


@each_measure_with_definition
def test_bfloat16_is_computed_in_float32(measure, definition):
    x_NV, log_p_NV = random_rows(3, 2 * SMALL)
    x_NV, log_p_NV = x_NV.bfloat16().requires_grad_(), log_p_NV.bfloat16()
    value_N = measure(x_NV, log_p_NV)
    assert value_N.dtype == torch.float32
    expected_N = defined(definition, x_NV.detach(), log_p_NV)
    np.testing.assert_allclose(value_N.detach().numpy(), expected_N, rtol=1e-5, atol=1e-5)
    value_N.sum().backward()
    assert x_NV.grad.dtype == torch.bfloat16


@each_measure
def test_shapes_one_dimension_any_leading_ones_and_a_shared_distribution(measure):
    x_NV, log_p_NV = random_rows(6, 5)
    value_N = measure(x_NV, log_p_NV)
    torch.testing.assert_close(measure(x_NV[2], log_p_NV[2]), value_N[2])
    torch.testing.assert_close(measure(x_NV.view(2, 3, 5), log_p_NV.view(2, 3, 5)), value_N.view(2, 3))
    torch.testing.assert_close(measure(x_NV, log_p_NV[0]), measure(x_NV, log_p_NV[:1].repeat(6, 1)))
    assert measure(x_NV[:0], log_p_NV[:0]).shape == (0,)
    assert measure(x_NV[:, :1], log_p_NV[:, :1]).tolist() == x_NV[:, 0].tolist()


# --- the quantile -----------------------------------------------------------------------------------------------------

HARD_ROWS = {
    "all equal": lambda x: torch.zeros_like(x),
    "two values": lambda x: (x > 0).to(x.dtype),
    "many ties": lambda x: (8 * x).round(),
    "one huge outlier": lambda x: torch.cat([x[:-1], torch.full((1,), 1e30, dtype=x.dtype)]),
    "one tiny outlier": lambda x: torch.cat([x[:-1], torch.full((1,), -1e30, dtype=x.dtype)]),
    "denormals": lambda x: x * 1e-42,
    "largest floats": lambda x: x.sign() * torch.finfo(x.dtype).max,
    "exponential spread": lambda x: torch.exp(10 * x),
    "an infinity at each end": lambda x: torch.cat([x[:-2], torch.tensor([math.inf, -math.inf], dtype=x.dtype)]),
    "one ulp apart": lambda x: 1 + torch.finfo(x.dtype).eps * (8 * x).round(),
}


@pytest.mark.parametrize("row", HARD_ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("alpha", [0.999, 0.97, 0.5, 0.03, 1e-4])
@pytest.mark.parametrize("peak", [0.0, 3.0, 20.0])
def test_quantile_by_counting_is_the_sorted_one(row, dtype, alpha, peak):
    x_V, log_p_V = (t[0] for t in random_rows(1, 4 * SMALL, seed=3, peak=peak))
    x_V, p_V = HARD_ROWS[row](x_V.to(dtype)), log_p_V.to(dtype).exp()
    share_V = upper_tail(x_V[None], p_V[None], alpha)[0]
    order = np.argsort(-x_V.double().numpy(), kind="stable")
    sorted_x, sorted_p = x_V.double().numpy()[order], p_V.double().numpy()[order]
    expected_t = sorted_x[np.searchsorted(np.cumsum(sorted_p), alpha)]
    expected_share = (alpha - sorted_p[sorted_x > expected_t].sum()) / sorted_p[sorted_x == expected_t].sum()
    assert share_V.dtype == dtype
    assert torch.equal(share_V == 1, x_V > expected_t) or expected_share > 1 - 1e-6
    assert share_V[x_V > expected_t].eq(1).all() and share_V[x_V < expected_t].eq(0).all()
    assert share_V[x_V == expected_t].numpy() == pytest.approx(expected_share, abs=1e-5)


def test_an_alpha_that_rounding_puts_out_of_reach_takes_everything():
    p_NV = torch.full((1, 2 * SMALL), 1 / (2 * SMALL)) * (1 - 1e-6)
    x_NV = torch.arange(2.0 * SMALL)[None]
    for size in (4, 2 * SMALL):
        share_NV = upper_tail(x_NV[:, -size:], p_NV[:, -size:] * (2 * SMALL / size), 1 - 1e-9)
        assert torch.equal(share_NV, torch.ones(1, size))


# --- parameters and recipes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0, -0.1, 1.0001, math.nan, math.inf, "0.5", None, True])
@pytest.mark.parametrize("kind", [CVaR, EVaR])
def test_a_tail_share_outside_zero_to_one_is_refused(kind, alpha):
    with pytest.raises(ConfigError, match="0 < alpha <= 1"):
        kind(alpha)


@pytest.mark.parametrize("eta", [0, -1.0, math.nan, math.inf, "1", None, True])
def test_an_eta_that_is_not_positive_is_refused(eta):
    with pytest.raises(ConfigError, match="eta"):
        Entropic(eta)


@pytest.mark.parametrize(
    "parts", [[], [(0.5, Mean())], [(1.5, Mean()), (-0.5, Mean())], [(math.nan, Mean())], [(1.0, "mean")]]
)
def test_a_mixture_needs_measures_and_weights_that_sum_to_one(parts):
    with pytest.raises(ConfigError, match="mixture"):
        Mixture(parts)


PARTS = [{"weight": 0.25, "measure": "mean"}, {"weight": 0.75, "measure": "cvar", "alpha": 0.1}]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"measure": "mean"}, Mean()),
        ({"measure": "cvar", "alpha": 0.97}, CVaR(0.97)),
        ({"measure": "entropic", "eta": 1}, Entropic(1)),
        ({"measure": "evar", "alpha": 0.9}, EVaR(0.9)),
        ({"measure": "worst_case"}, WorstCase()),
        ({"measure": "mixture", "parts": PARTS}, Mixture([(0.25, Mean()), (0.75, CVaR(0.1))])),
    ],
)
def test_a_recipe_names_a_measure(spec, expected):
    built = build(spec)
    assert built == expected
    assert isinstance(built, RiskMeasure)


@pytest.mark.parametrize(
    "spec",
    [
        {},
        {"measure": "var"},
        {"measure": ["cvar"]},
        {"measure": "cvar"},
        {"measure": "cvar", "alpha": 2},
        {"measure": "cvar", "alpha": 0.5, "eta": 1},
        {"measure": "mean", "alpha": 0.5},
        {"measure": "mixture"},
        {"measure": "mixture", "parts": ["mean"]},
        {"measure": "mixture", "parts": [{"measure": "mean"}]},
        {"measure": "mixture", "parts": [{"weight": 1, "measure": "mean"}], "alpha": 1},
        "cvar",
    ],
)
def test_a_recipe_that_names_no_measure_is_refused(spec):
    with pytest.raises(ConfigError):
        build(spec)
