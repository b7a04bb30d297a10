"""Cost models and the constraint they state; larger is worse."""

if __name__ != "stepwise.constraints":
    raise ImportError(f"import this package as 'stepwise.constraints', not as {__name__!r}")

from typing import TYPE_CHECKING

from stepwise.constraints.multiplier import PID, DualAscent, Fixed, Multiplier

if TYPE_CHECKING:
    from stepwise.constraints.constraint import Constraint

__all__ = ["PID", "Constraint", "DualAscent", "Fixed", "Multiplier"]


def __getattr__(name: str) -> object:
    """Import `Constraint` when it is asked for: it needs NumPy, and cost models that are looked up here do not."""
    if name == "Constraint":
        from stepwise.constraints.constraint import Constraint

        return Constraint
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
