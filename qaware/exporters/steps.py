"""What the runners of every cache ask of a step."""

from __future__ import annotations

from qaware.errors import QawareError


def require_given(name: str, start: int, held: int) -> None:
    """That the ``held`` tokens which a cache has reach up to a step at place ``start``.

    Raises:
        QawareError: names the file ``name`` and both numbers.
    """
    if start > held:
        raise QawareError(
            f"{name}: step at {start}, but only {held} tokens were given; give those before it first"
        )
