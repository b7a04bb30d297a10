"""Cost models and the constraint they state; larger is worse."""

if __name__ != "stepwise.constraints":
    raise ImportError(f"import this package as 'stepwise.constraints', not as {__name__!r}")

from stepwise.constraints.constraint import Constraint
from stepwise.constraints.multiplier import PID, DualAscent, Fixed, Multiplier

__all__ = ["PID", "Constraint", "DualAscent", "Fixed", "Multiplier"]
