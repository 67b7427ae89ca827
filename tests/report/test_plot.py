"""The plot: one point a row that has a difference, and a file only when there is one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qaware.errors import QawareError
from qaware.report.plot import plot_loss


def row(model: str, stage: str, **values: Any) -> dict[str, Any]:
    return {"model": model, "stage": stage, "bytes": 1_500_000, **values}


ROWS = [
    row("float", "float"),
    row("int4", "converted", d_nats=0.2, d_nats_ci95=0.01),
    row("int4", "tract", d_nats=0.3, d_nats_ci95=None),
    row("int8", "converted", d_nats=0.0),
    row("int8", "aoti", d_nats=None, failed="boom"),
]


def test_a_png_is_written(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "loss.png"
    assert plot_loss(ROWS, path, "a $title with _odd_ {signs}") is True
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert [p.name for p in path.parent.iterdir()] == ["loss.png"]


def test_nothing_to_plot_writes_nothing(tmp_path: Path) -> None:
    assert plot_loss([], tmp_path / "loss.png", "t") is False
    assert plot_loss(ROWS[:1], tmp_path / "loss.png", "t") is False
    assert list(tmp_path.iterdir()) == []


def test_every_row_with_a_difference_is_a_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    points, draw = [], Axes.errorbar

    def spy(self: Axes, x: float, y: float, **options: Any) -> Any:
        points.append((x, y, options["yerr"], options["color"]))
        return draw(self, x, y, **options)

    monkeypatch.setattr(Axes, "errorbar", spy)
    plot_loss(ROWS, tmp_path / "loss.png", "t")
    assert points == [(1.5, 0.2, 0.01, "C0"), (1.5, 0.3, None, "C0"), (1.5, 0.0, None, "C1")]


def test_more_stages_and_models_than_markers(tmp_path: Path) -> None:
    rows = [row(f"m{i}", f"s{i}", d_nats=i / 10) for i in range(12)]
    assert plot_loss(rows, tmp_path / "loss.png", "t")


def test_no_global_state_of_matplotlib_is_touched(tmp_path: Path) -> None:
    import sys

    before = "matplotlib.pyplot" in sys.modules
    plot_loss(ROWS, tmp_path / "loss.png", "t")
    assert ("matplotlib.pyplot" in sys.modules) is before


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(QawareError, match="cannot be written"):
        plot_loss(ROWS, tmp_path / "file" / "loss.png", "t")
