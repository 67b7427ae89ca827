"""What is calibrated. Each observer declares how its statistics are reduced over ranks."""

from __future__ import annotations

from qaware.observers.minmax import MinMaxObserver
from qaware.observers.reduce import all_reduce, observers

__all__ = ["MinMaxObserver", "all_reduce", "observers"]
