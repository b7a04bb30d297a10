"""Texts with places to fill in."""

from __future__ import annotations

import re


def fill(template: str, **parts: str) -> str:
    """The template with {name} of every part replaced, in one pass: a part that itself holds {name} is text like any
    other."""
    return re.sub(r"\{(" + "|".join(parts) + r")\}", lambda match: parts[match[1]], template)
