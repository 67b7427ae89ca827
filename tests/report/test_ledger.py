"""Ledger: differences that mean something, and rows that are on disk as soon as they are measured."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qaware.errors import QawareError
from qaware.metrics.score import Score, paired
from qaware.report.ledger import Comparison, Ledger, read_rows

Make = Callable[..., Score]
FLOAT = (10.0, 30.0, 20.0, 15.0)
COMPARED = Comparison(base="float", ptq="ptq")


def shifted(by: float, wobble: float = 0.01) -> tuple[float, ...]:
    """FLOAT's losses plus ``10 * by`` a window, that is ``by`` nats a token, give or take ``wobble``."""
    signs = (1, -1, 1, -1)
    return tuple(loss + 10 * (by + wobble * s) for loss, s in zip(FLOAT, signs, strict=True))


def filled(score: Make) -> Ledger:
    ledger = Ledger()
    ledger.add("float", "float", score(*FLOAT), 100)
    ledger.add("ptq", "converted", score(*shifted(0.4)), 50, Comparison("float"))
    return ledger


def test_a_row_holds_the_score_and_the_facts(score: Make) -> None:
    made = score(*FLOAT, kl=0.5, top1=0.9)
    row = Ledger().add("m", "converted", made, 123, notes=["n"], parity=None, artifact="f.pte")
    assert (row["model"], row["stage"], row["bytes"]) == ("m", "converted", 123)
    assert (row["nats"], row["kl"], row["top1"]) == (made.nats, 0.5, 0.9)
    assert (row["notes"], row["artifact"]) == (["n"], "f.pte")
    assert "parity" not in row
    assert "d_nats" not in row
    assert "losses" not in row


def test_a_row_without_a_score() -> None:
    assert Ledger().add("m", "aoti", None, 0, COMPARED, failed="boom") == {
        "model": "m",
        "stage": "aoti",
        "bytes": 0,
        "failed": "boom",
    }


def test_classifiers_are_compared_by_accuracy_too(score: Make) -> None:
    ledger = Ledger()
    ledger.add("float", "float", score(*FLOAT, hits=(1, 1, 1, 0)), 100)
    row = ledger.add("ptq", "converted", score(*FLOAT, hits=(1, 0, 0, 0)), 50, Comparison("float"))
    assert row["d_accuracy"] == -0.5
    assert 0 < row["d_accuracy_ci95"] < 1
    assert "hits" not in row
    assert "d_accuracy" not in filled(score).rows[1]


def test_d_nats_is_paired(score: Make) -> None:
    ledger = filled(score)
    made = score(*shifted(0.1))
    row = ledger.add("qat", "converted", made, 50, Comparison("float"))
    difference, width = paired(made, score(*FLOAT))
    assert row["base"] == "float"
    assert row["d_nats"] == pytest.approx(0.1)
    assert (row["d_nats"], row["d_nats_ci95"]) == (difference, width)
    assert row["d_nats_ci95"] < row["ci95"] / 10
    assert "recovered" not in row
    assert "ptq_loss_nats" not in row


@pytest.mark.parametrize(("loss", "share"), [(0.1, 0.75), (0.4, 0.0), (0.0, 1.0), (-0.04, 1.1), (0.6, -0.5)])
def test_recovered_is_the_share_of_the_ptq_loss(score: Make, loss: float, share: float) -> None:
    row = filled(score).add("qat", "converted", score(*shifted(loss)), 50, COMPARED)
    assert row["ptq_loss_nats"] == pytest.approx(0.4)
    assert row["recovered"] == pytest.approx(share)


def test_nothing_is_recovered_from_a_ptq_loss_within_its_interval(score: Make) -> None:
    ledger = Ledger()
    ledger.add("float", "float", score(*FLOAT), 100)
    ledger.add("ptq", "converted", score(*shifted(0.01, wobble=0.1)), 50, Comparison("float"))
    row = ledger.add("qat", "converted", score(*shifted(0.0)), 50, COMPARED)
    assert row["ptq_loss_nats"] == pytest.approx(0.01)
    assert "recovered" not in row


def test_a_ptq_that_is_better_than_float_leaves_nothing_to_recover(score: Make) -> None:
    ledger = Ledger()
    ledger.add("float", "float", score(*FLOAT), 100)
    ledger.add("ptq", "converted", score(*shifted(-0.4)), 50)
    assert "recovered" not in ledger.add("qat", "converted", score(*shifted(0.1)), 50, COMPARED)


def test_ptq_is_taken_from_the_same_stage_else_from_converted(score: Make) -> None:
    ledger = filled(score)
    ledger.add("ptq", "tract", score(*shifted(0.8)), 50, Comparison("float"))
    made = score(*shifted(0.2))
    assert ledger.add("qat", "tract", made, 50, COMPARED)["recovered"] == pytest.approx(0.75)
    assert ledger.add("qat", "aoti", made, 50, COMPARED)["recovered"] == pytest.approx(0.5)


def test_an_unknown_base_or_ptq_adds_nothing(score: Make) -> None:
    ledger = filled(score)
    assert "d_nats" not in ledger.add("a", "converted", score(*FLOAT), 1, Comparison("other", "ptq"))
    row = ledger.add("b", "converted", score(*FLOAT), 1, Comparison("float", "other"))
    assert row["d_nats"] == 0
    assert "ptq_loss_nats" not in row


def test_scores_of_different_protocols_are_never_subtracted(score: Make) -> None:
    ledger = filled(score)
    with pytest.raises(QawareError, match=r"window 11|window 12"):
        ledger.add("x", "converted", score(*FLOAT, protocol={"data": "d", "window": 12}), 1, COMPARED)


def test_one_window_has_no_interval(score: Make) -> None:
    one = {"counts": (10,), "ci95": None}
    ledger = Ledger()
    ledger.add("float", "float", score(10.0, **one), 1)
    ledger.add("ptq", "converted", score(15.0, **one), 1)
    row = ledger.add("qat", "converted", score(12.0, **one), 1, COMPARED)
    assert row["d_nats"] == pytest.approx(0.2)
    assert row["d_nats_ci95"] is None
    assert "recovered" not in row


def test_rows_are_on_disk_at_once_and_read_back(score: Make, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "new" / "results.jsonl")
    assert ledger.path is not None
    for count in range(1, 4):
        ledger.add("m", f"stage ±{count}", score(*FLOAT, perplexity=math.inf), count, COMPARED)
        assert read_rows(ledger.path) == ledger.rows
    assert ledger.rows[0]["perplexity"] is None


def test_a_killed_run_loses_no_written_row(tmp_path: Path) -> None:
    code = (
        "import os, signal, pathlib, sys; from qaware.report.ledger import Ledger\n"
        "ledger = Ledger(pathlib.Path(sys.argv[1])); ledger.add('m', 'float', None, 1)\n"
        "ledger.add('m', 'converted', None, 2); os.kill(os.getpid(), signal.SIGKILL)"
    )
    path = tmp_path / "results.jsonl"
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == -9
    assert [row["stage"] for row in read_rows(path)] == ["float", "converted"]


def test_a_last_line_that_was_cut_is_dropped_wherever_it_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    first, second = ({"model": "m", "stage": s, "bytes": 1} for s in ("float", "converted"))
    last = json.dumps(second)
    for end in range(len(last)):
        path.write_text(json.dumps(first) + "\n" + last[:end])
        assert read_rows(path) == [first]
    path.write_text(json.dumps(first) + "\n" + last)
    assert read_rows(path) == [first, second]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "has no finished row"),
        ('{"model": "m", "st', "has no finished row"),
        ('{"model"\n{"model": "m", "stage": "s", "bytes": 1}\n', ":1: is not valid JSON"),
        ('{"model": "m", "stage": "s"}\n', ":1: has no model, stage and bytes"),
        ('{"model": "m", "stage": "s", "bytes": "x"}\n', ":1: has no model, stage and bytes"),
        ("[1]\n", ":1: has no model, stage and bytes"),
        ("3\n", ":1: has no model, stage and bytes"),
    ],
)
def test_a_file_that_is_no_ledger_is_named(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(content)
    with pytest.raises(QawareError) as caught:
        read_rows(path)
    assert f"{path}" in str(caught.value)
    assert words in str(caught.value)


def test_a_missing_or_binary_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(QawareError, match=r"results\.jsonl: cannot be read"):
        read_rows(tmp_path / "results.jsonl")
    (tmp_path / "x").write_bytes(b"\xff\xff")
    with pytest.raises(QawareError, match="cannot be read"):
        read_rows(tmp_path / "x")


@pytest.mark.parametrize("name", ["file/results.jsonl", "folder"])
def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("I am not a folder")
    (tmp_path / "folder").mkdir()
    with pytest.raises(
        QawareError, match=rf"{name}: cannot be written \(.*\); free or choose another folder"
    ):
        Ledger(tmp_path / name).add("m", "float", None, 1)


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").symlink_to("/dev/full")
    with pytest.raises(QawareError, match="No space left on device"):
        Ledger(tmp_path / "results.jsonl").add("m", "float", None, 1)


def test_the_rows_of_an_earlier_run_are_kept_under_another_name(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    for size in (1, 2, 3):
        Ledger(path).add("float", "float", None, size)
    assert [row["bytes"] for row in read_rows(path)] == [3]
    assert [row["bytes"] for row in read_rows(tmp_path / "results-1.jsonl")] == [1]
    assert [row["bytes"] for row in read_rows(tmp_path / "results-2.jsonl")] == [2]
