"""What is calibrated. Each observer declares how its statistics are reduced over ranks."""

from __future__ import annotations

from qaware.observers.histogram import HistogramObserver
from qaware.observers.minmax import MinMaxObserver
from qaware.observers.moving_average import MovingAverageObserver
from qaware.observers.mse import MSEObserver
from qaware.observers.percentile import PercentileObserver
from qaware.observers.reduce import all_reduce, observers

KINDS: dict[str, type[MinMaxObserver]] = {
    "minmax": MinMaxObserver,
    "moving-average": MovingAverageObserver,
    "histogram": HistogramObserver,
    "percentile": PercentileObserver,
    "mse": MSEObserver,
}
"""By the name in a scheme."""

__all__ = [
    "KINDS",
    "HistogramObserver",
    "MSEObserver",
    "MinMaxObserver",
    "MovingAverageObserver",
    "PercentileObserver",
    "all_reduce",
    "observers",
]
