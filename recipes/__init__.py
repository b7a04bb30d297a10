"""Recipes shipped with stepwise: YAML files, read through `stepwise.recipe`."""

if __name__ != "stepwise.recipes":
    raise ImportError(f"import this package as 'stepwise.recipes', not as {__name__!r}")
