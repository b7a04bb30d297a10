"""The peak of a piece of work is its own, not that of what ran before it."""

import sys
from pathlib import Path

import numpy as np
import pytest

from stepwise.footprint import Footprint

MIB = 2**20


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason=f"no peak to set back on {sys.platform}")
def test_the_peak_of_memory_is_that_of_the_work_since_the_start() -> None:
    idle = Footprint().numbers()["peak_host_bytes"]
    work = Footprint()
    held = np.ones(200 * MIB // 8)
    peak = work.numbers()["peak_host_bytes"]
    del held
    after = Footprint().numbers()["peak_host_bytes"]
    assert peak - idle == pytest.approx(200 * MIB, rel=0.05)
    assert peak - after > 150 * MIB


def test_time_passes() -> None:
    work = Footprint()
    assert 0 <= work.seconds <= work.numbers()["seconds"]
