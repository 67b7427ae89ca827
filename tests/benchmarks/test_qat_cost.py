"""The cost of a QAT step, on models of milliseconds: every row is there and compares what it says."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torchao.quantization.qat import FakeQuantizedLinear

from benchmarks import qat_cost
from benchmarks.qat_cost_cases import Size, Step, image_step, language_step
from benchmarks.rows import Row, table

TINY = Size(width=64, hidden=96, blocks=1, words=64, windows=2, tokens=8, depth=8, images=2, rank=2)


PEAKS = {"float": 100, "int8-dynamic": 200, "lora": 120, "lora everywhere": 160}


@pytest.fixture(scope="module")
def found() -> list[Row]:
    """Without a process for each peak, which takes seconds; one is measured below."""
    pytest.importorskip("peft")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qat_cost, "_peak", lambda kind, size: PEAKS[kind])
        return qat_cost.rows(TINY, repeats=1, compiled=False)


def test_every_row_is_measured_against_its_target(found: list[Row]) -> None:
    assert [row.row for row in found] == [
        "QAT step against float, eager, weight-only",
        "QAT step against float, eager, int8-dynamic",
        "LoRA-QAT against plain QAT, speed",
        "QAT step against float, eager, static",
        "LoRA-QAT against plain QAT, peak memory",
    ]
    for row in found:
        assert row.target
        if row.met is None:
            assert row.value.startswith("not measured")
        else:
            assert bool(row.missed_by) is not row.met
            assert row.details[0]["model"] == "float"
    assert len(table(found).splitlines()) > 2 + len(found)


def test_memory_is_compared_with_plain_qat(found: list[Row]) -> None:
    assert found[-1].value == "40% less, adapters everywhere 20%"
    assert found[-1].met is True
    assert [d["megabytes"] * 1e6 for d in found[-1].details] == list(PEAKS.values())


def test_a_process_measures_its_peak() -> None:
    pytest.importorskip("peft")
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc")
    size = dataclasses.replace(TINY, words=8192)
    assert 4 * size.words * size.width < qat_cost._peak("lora", size) < 10**8


def test_ratios_are_of_the_same_round() -> None:
    seconds = {"float": [1.0, 2.0, 4.0], "qat": [2.0, 4.0, 12.0]}
    assert qat_cost.ratio(seconds, "qat") == 2.0
    assert qat_cost.ratio(seconds, "float", "qat") == 0.5


def test_steps_take_turns_after_a_warm_up() -> None:
    calls: list[str] = []

    class Noted(Step):
        def __init__(self, name: str) -> None:
            self.name = name

        def __call__(self) -> float:
            calls.append(self.name)
            return 0.0

    seconds = qat_cost.interleaved({"a": Noted("a"), "b": Noted("b")}, 2)
    assert calls == ["a"] * qat_cost.WARM_UP + ["b"] * qat_cost.WARM_UP + ["a", "b"] * 2
    assert [len(taken) for taken in seconds.values()] == [2, 2]


@pytest.mark.parametrize("kind", ["weight-only", "int8-dynamic"])
def test_ours_and_torchaos_loop_round_the_same_layers(kind: str) -> None:
    rounded = []
    for prefix in ("", "torchao "):
        model = language_step(f"{prefix}{kind}", TINY).forward
        rounded.append({n for n, m in model.named_modules() if isinstance(m, FakeQuantizedLinear)})
        assert model.model.embed_tokens.weight_fake_quantizer is not None
    assert rounded[0] == rounded[1]
    assert len(rounded[0]) == 8


def test_every_kind_trains() -> None:
    pytest.importorskip("peft")
    for step in (
        language_step("lora", TINY),
        language_step("lora everywhere", TINY),
        image_step("int8-static", TINY),
        image_step("float", TINY),
    ):
        losses = [step() for _ in range(2)]
        assert all(torch.tensor(losses).isfinite())


def test_the_file_and_the_table(
    found: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(qat_cost, "rows", lambda compiled: found)
    out = tmp_path / "qat_cost.json"
    assert qat_cost.main(["--out", str(out), "--eager"]) == 0
    written = json.loads(out.read_text())
    assert [row["row"] for row in written["rows"]] == [row.row for row in found]
    assert "| QAT step against float, eager, static |" in capsys.readouterr().out
