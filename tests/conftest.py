"""Settings of the whole suite: examples are drawn anew by a fixed seed, and no test fails because a machine is slow."""

import gc
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("stepwise", deadline=None, derandomize=True)
settings.load_profile("stepwise")


def pytest_collection_finish(session: pytest.Session) -> None:
    """The library collects all garbage after every training: spare it what was imported, hundreds of thousands of
    objects, at 0.4 s each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with a certified strength, made once; copy it before you change it."""
    import small_runs

    return small_runs.make(tmp_path_factory.mktemp("small"))
