"""What is calibrated. Each observer declares how its statistics are reduced over ranks."""

from __future__ import annotations

from qaware.observers.histogram import HistogramObserver
from qaware.observers.minmax import MinMaxObserver
from qaware.observers.reduce import all_reduce, observers

KINDS: dict[str, type[MinMaxObserver]] = {"minmax": MinMaxObserver, "histogram": HistogramObserver}
"""By the name in a scheme."""

__all__ = ["KINDS", "HistogramObserver", "MinMaxObserver", "all_reduce", "observers"]
