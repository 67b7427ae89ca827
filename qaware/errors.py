"""The errors that a user can act on. The command line prints them as one line and exits with code 2."""

from __future__ import annotations


class QawareError(ValueError):
    """Something the user gave cannot work; the message names it, its value, and the way out."""


class RuntimeDiedError(QawareError):
    """A runtime's process ended (signal or exit code) while it was loading or running an artifact."""


class ParityError(QawareError):
    """An exported artifact does not compute what the converted model computes."""
