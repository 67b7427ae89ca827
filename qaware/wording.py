"""Counts in sentences for people: one layer, two layers."""

from __future__ import annotations


def counted(count: int, noun: str) -> str:
    """``1 layer`` or ``2,000 layers``; for nouns that take an s."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")
