"""The fault injections of tests/faults in full: python benchmarks/faults.py [what ...] [--kills 100] [--flips 1000] ...

kills: SIGKILL at random moments of a training, a third of them inside a save; resumed; S compared bit for bit.
boundaries: SIGKILL before each operation on files of one save of a training; resumed; S compared.
stops: SIGTERM in each step of a training of 50; resumed; S compared.
signals: SIGTERM and SIGINT at random moments; exit code, steps lost, S.
damage: flipped bits, cuts, zeroed pages in a checkpoint: found, named, the one before used.
baseline: the kills again, with checkpoints written as training libraries do: straight into the final folder, the
    highest step wins.

S is a digest of adapter, optimiser moments, scheduler, random states, data cursor and step log (tests/trials.py).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
TESTS = Path(__file__).parent.parent / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "faults")]

import small_models  # noqa: E402
from damages import flip_bit, missed, truncate, zero_page  # noqa: E402
from forks import fork  # noqa: E402
from kills import MICRO_BATCHES, Killed, Progress, kill, kill_in_save, newest_step, stop_in_step  # noqa: E402
from trials import METHODS, TRAINING, Trial, state  # noqa: E402

from stepwise import checkpoint  # noqa: E402


class Bench:
    """A base and the uninterrupted trainings, in a temporary folder."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.rng, self._runs = folder, random.Random(seed), iter(range(10**9))
        self.base = small_models.save(small_models.llama, folder / "base")
        self.whole = {method: self.trial(method) for method in METHODS}
        for trial in self.whole.values():
            assert fork(trial.run).code == 0
        self.wanted = {method: state(trial.folder) for method, trial in self.whole.items()}

    def trial(self, method: str) -> Trial:
        return Trial(self.base, self.folder / f"run-{next(self._runs)}", method)

    def kills(self, count: int) -> dict[str, object]:
        found: list[Killed] = []
        for number in range(20 * count):
            if len(found) == count:
                break
            method = METHODS[number % 2]
            killed = kill(self.trial(method), self.wanted[method], self.rng, inside=number % 5 < 2)
            found += [] if killed is None else [killed]
        return _summary(found)

    def boundaries(self, count: int) -> dict[str, object]:
        found: list[Killed] = []
        for k in range(1, count + 1):
            killed = kill_in_save(self.trial(METHODS[k % 2]), self.wanted[METHODS[k % 2]], k, save=3)
            if killed is None:
                break
            found.append(killed)
        return _summary(found)

    def stops(self, count: int) -> dict[str, object]:
        failed: list[str] = []
        settings = replace(TRAINING, epochs=count / 5, save_every=7, log_every=3)
        for method in METHODS:
            whole = replace(self.trial(method), training=settings)
            assert fork(whole.run).code == 0
            for step in range(1, count + 1):
                trial = replace(self.trial(method), training=settings)
                stopped = stop_in_step(trial, step)
                saved, resumed = newest_step(trial.checkpoints), fork(trial.run)
                if (stopped.code, saved, resumed.code) != (143, step, 0) or state(trial.folder) != state(whole.folder):
                    failed.append(f"{method} {step}")
        return {"stops": 2 * count, "failed or different": failed}

    def signals(self, count: int) -> dict[str, object]:
        failed: list[str] = []
        for number in range(count):
            sent, code = ((signal.SIGTERM, 143), (signal.SIGINT, 130))[number % 2]
            trial = replace(self.trial("rsa"), training=replace(TRAINING, log_every=1))
            progress = Progress()
            ended = fork(progress.observe(trial), watch=self._signal_at_random(progress, sent))
            taken = len((trial.folder / "log.jsonl").read_text().splitlines())
            lost = taken - newest_step(trial.checkpoints)
            resumed = fork(trial.run).code
            same = state(trial.folder)["adapter"] == self.wanted["rsa"]["adapter"]
            if (ended.code, lost, resumed, same) != (code, 0, 0, True):
                failed.append(f"signal {sent} after {taken}: code {ended.code}, lost {lost}, resumed {resumed}, {same}")
        return {"signals": count, "wrong code, lost steps or different": failed}

    def _signal_at_random(self, progress: Progress, number: int) -> Callable[[int], None]:
        target, pause = self.rng.randrange(MICRO_BATCHES - 3), self.rng.random() * 0.05

        def watch(pid: int) -> None:
            while progress.read()[0] <= target:
                time.sleep(0.0002)
            time.sleep(pause)
            os.kill(pid, number)

        return watch

    def damage(self, flips: int, cuts: int, pages: int) -> dict[str, object]:
        parent = self.whole["rsa"].checkpoints
        plan = ((flip_bit, flips), (truncate, cuts), (zero_page, pages))
        return {f"{d.__name__} x {times}: missed": missed(parent, d, self.rng, times) for d, times in plan}

    def baseline(self, count: int) -> dict[str, object]:
        """The usual order of writing: nothing temporary, no sums, no fsync; whatever has the highest step is used."""

        def save_step(parent: Path, step: int, fill: Callable[[Path], None], *, keep: int) -> Path:
            folder = parent / f"step-{step:08d}"
            folder.mkdir(parents=True, exist_ok=True)
            fill(folder)
            return folder

        def newest(parent: Path, *, warn: Callable[[str], None]) -> Path | None:
            return max(checkpoint.steps(parent), default=None)

        ours = checkpoint.save_step, checkpoint.newest
        checkpoint.save_step, checkpoint.newest = save_step, newest
        try:
            return self.kills(count)
        finally:
            checkpoint.save_step, checkpoint.newest = ours


def _summary(found: list[Killed]) -> dict[str, object]:
    return {
        "kills": len(found),
        "inside a save": sum(k.inside_a_save for k in found),
        "resumption failed": sum(k.resumed != 0 for k in found),
        "resumed, S different": sum(k.resumed == 0 and not k.equal for k in found),
        "errors": sorted({k.error.strip().splitlines()[-1].partition(":")[0] for k in found if k.resumed != 0}),
    }


def _jobs(bench: Bench, count: argparse.Namespace) -> Iterator[tuple[str, Callable[[], dict[str, object]]]]:
    yield "kills", lambda: bench.kills(count.kills)
    yield "boundaries", lambda: bench.boundaries(count.boundaries)
    yield "stops", lambda: bench.stops(count.stops)
    yield "signals", lambda: bench.signals(count.signals)
    yield "damage", lambda: bench.damage(count.flips, count.cuts, count.pages)
    yield "baseline", lambda: bench.baseline(count.kills)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help="kills, boundaries, stops, signals, damage, baseline; all if absent")
    defaults = {"kills": 100, "boundaries": 1000, "stops": 50, "signals": 40, "flips": 1000, "cuts": 500, "pages": 500}
    for name, value in {**defaults, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), arguments.seed)
        for name, job in _jobs(bench, arguments):
            if not arguments.what or name in arguments.what:
                print(json.dumps({name: job()}), flush=True)


if __name__ == "__main__":
    main()
