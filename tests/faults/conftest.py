"""A small base, and for each method the training that no one interrupted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import small_models
from forks import fork
from trials import Trial, state


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_models.save(small_models.llama, tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Trial]:
    """The finished, uninterrupted training of a method."""
    made: dict[str, Trial] = {}

    def get(method: str) -> Trial:
        if method not in made:
            made[method] = Trial(base, tmp_path_factory.mktemp("whole") / method, method)
            ended = fork(made[method].run)
            assert ended.code == 0, ended.error
        return made[method]

    return get


@pytest.fixture(scope="session")
def wanted(whole: Callable[[str], Trial]) -> Callable[[str], dict[str, str]]:
    """S of the uninterrupted training of a method."""
    return lambda method: state(whole(method).folder)
