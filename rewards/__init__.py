"""Reward models; larger is better."""

if __name__ != "stepwise.rewards":
    raise ImportError(f"import this package as 'stepwise.rewards', not as {__name__!r}")
