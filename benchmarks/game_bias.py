"""What corrections of a risk of K opponents leave of its bias: the gap to the equilibrium of the game.

    OMP_NUM_THREADS=1 python benchmarks/game_bias.py [--games 8] [--steps 8000] [--actions 10]

Random soft games, beta 0.1. Mirror descent in logits with payoffs estimated from K opponents, drawn from the policy and
shared by all actions, as `draws` of a game stage does; steps fall as 1 / t and the logits of the second half are
averaged, so that what remains is the bias of the estimate rather than its noise. The gap of the averaged policy in the
exact game is printed, a mean over the games; 0 is the equilibrium. A dash is a correction that does not fit.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch

from stepwise import matrix_game
from stepwise.game_estimates import ESTIMATORS, Correcting, Follower, Memoryless, Tracker
from stepwise.risk import CVaR, Entropic

BETA = 0.1
DRAWS = (1, 2, 4, 8)
MEASURES: list[Entropic | CVaR] = [Entropic(2.0), Entropic(5.0), Entropic(10.0), CVaR(0.5), CVaR(0.25)]
CORRECTIONS = ("none", "jackknife", "delta", "tracker", "spacing", "follower")


def correcting(name: str, measure: Entropic | CVaR, draws: int) -> Correcting | None:
    """A correction as a game stage makes it; None where it does not fit."""
    entropic = isinstance(measure, Entropic)
    if name == "follower":
        return Follower(measure, gain=0.1)
    if name == "spacing":
        whole = not entropic and (measure.alpha * draws) % 1 == 0
        return Memoryless(measure, ESTIMATORS[name]) if whole else None
    if name == "none":
        return Memoryless(measure, ESTIMATORS[name])
    if not isinstance(measure, Entropic) or draws < 2:
        return None
    return Tracker(measure, gain=0.1) if name == "tracker" else Memoryless(measure, ESTIMATORS[name])


def soft_games(games: int, actions: int) -> np.ndarray:
    """P of every game, as the sigmoid of normal scores without order."""
    scores = np.random.default_rng(0).normal(size=(games, actions, actions))
    return 1 / (1 + np.exp(scores.transpose(0, 2, 1) - scores))


def gap(P: np.ndarray, measure: Entropic | CVaR, found: Correcting, *, draws: int, steps: int) -> np.ndarray:
    """Gap of the policy that noisy mirror descent ends at, of every game."""
    games, actions, _ = P.shape
    wins = torch.from_numpy(P)
    s, mean = torch.zeros(games, actions, dtype=torch.float64), torch.zeros(games, actions, dtype=torch.float64)
    uniform = torch.zeros_like(wins)
    known = found.start(-measure(-wins, uniform)[:, None])
    random = torch.Generator().manual_seed(1)
    for step in range(steps):
        mu = torch.softmax(s, -1)
        drawn = torch.multinomial(mu, draws, replacement=True, generator=random)
        pay, known = found.estimate(wins.gather(-1, drawn[:, None, :].expand(-1, actions, -1))[:, None], known)
        share = min(0.05, 5 / (step + 1))  # eta beta
        s = (1 - share) * s + share * pay[:, 0] / BETA
        s -= s.mean(-1, keepdim=True)
        if 2 * step >= steps:
            mean += s / (steps - steps // 2)
    policy = torch.softmax(mean, -1).numpy()
    return matrix_game.gap(P, policy, np.full((games, actions), 1 / actions), beta=BETA, risk=measure)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--games", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--actions", type=int, default=10)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    started = time.process_time()
    P = soft_games(asked.games, asked.actions)
    print("| risk | K | " + " | ".join(CORRECTIONS) + " |\n|---|---:|" + "---:|" * len(CORRECTIONS))
    for measure in MEASURES:
        for draws in DRAWS:
            cells = []
            for name in CORRECTIONS:
                found = correcting(name, measure, draws)
                if found is None:
                    cells.append("-")
                    continue
                gaps = gap(P, measure, found, draws=draws, steps=asked.steps)
                cells.append(f"{gaps.mean():.1e}")
            print(f"| {measure} | {draws} | " + " | ".join(cells) + " |", flush=True)
    print(f"{time.process_time() - started:.0f} CPU s")


if __name__ == "__main__":
    main()
