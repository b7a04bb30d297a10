"""Settings of the whole suite: examples are drawn anew by a fixed seed, and no test fails because a machine is slow."""

from hypothesis import settings

settings.register_profile("stepwise", deadline=None, derandomize=True)
settings.load_profile("stepwise")
