"""Cost models and the constraint they state; larger is worse."""

if __name__ != "stepwise.constraints":
    raise ImportError(f"import this package as 'stepwise.constraints', not as {__name__!r}")
