"""The speed benchmark on models of milliseconds: it builds, opens, compares and writes; never how fast."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import measuring, speed
from benchmarks.contender import CNN, LM, RUNTIMES, Contender, Runtime, runtime
from benchmarks.rows import Row
from benchmarks.speed_rows import Measured, Results, Target, row, targets
from benchmarks.timing import Timing

FP32, INT8 = ("executorch", CNN, "fp32"), ("executorch", CNN, "int8")


def measured(key: tuple[str, str, str], seconds: float, size: int = 100) -> Measured:
    name, model, variant = key
    found = Measured(Contender(name, model, variant, "nowhere", size))
    for call in ("decode", "prefill", "image"):
        found.timings[call, 1] = Timing([seconds] * 3, [seconds] * 3)
        found.timings[call, 2] = Timing([seconds / 2] * 3, [seconds] * 3)
    return found


def compared(ours: tuple[tuple[str, str, str], ...], call: str, reach: float) -> Target:
    return Target("any", "ours against theirs", ours, FP32, call, reach)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """One real run: our convolution network in ExecuTorch, and a peer that is not there."""
    pytest.importorskip("executorch")
    folder = tmp_path_factory.mktemp("speed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "ROUNDS", 2)
        patch.setattr(measuring, "SECONDS", 0.001)
        patch.setattr(speed, "targets", lambda: [t for t in targets() if t.ours == (INT8,)])
        patch.setattr("benchmarks.peers.litert.LiteRT.packages", ("no_such_runtime",))
        arguments = ["--rows", "cnn", "--peers", "litert", "--size", "tiny", "--threads", "1"]
        arguments += ["--out", str(folder / "deep" / "speed.json"), "--work", str(folder / "work")]
        assert speed.main(arguments) == 0
    return json.loads((folder / "deep" / "speed.json").read_text())


def test_an_artifact_is_built_opened_and_compared(written: dict) -> None:
    (found,) = written["rows"]
    assert {"row", "target", "value", "met"} <= found.keys()
    assert found["met"] is not None
    assert [detail["model"] for detail in found["details"]] == ["executorch int8"]


def test_what_it_computes_is_that_of_the_float_model(written: dict) -> None:
    distance = {c["model"]: c["off_float_image"] for c in written["about"]["contenders"]}
    assert distance["executorch fp32"] < 1e-5
    assert 0 < distance["executorch int8"] < 0.1


def test_a_peer_that_is_not_installed_is_skipped_aloud(written: dict) -> None:
    why = written["about"]["skipped"]["litert cnn int8"]
    assert why == "skipped: no_such_runtime is not installed; pip install 'qaware[bench]'"


def test_the_machine_and_the_versions_are_written(written: dict) -> None:
    assert {"model", "features", "cores", "load"} <= written["about"]["machine"].keys()
    assert "torch" in written["about"]["versions"]


def test_every_runtime_can_be_asked_whether_it_is_there() -> None:
    for name in RUNTIMES:
        made = runtime(name)
        assert made.name == name
        assert (
            made.missing() is None or "pip install" in str(made.missing()) or "install" in str(made.missing())
        )
        assert "fp32" in made.variants[LM]


def test_the_best_of_ours_is_named_and_held_against_the_target() -> None:
    slow, fast = ("tract", LM, "int4"), ("aoti", LM, "int4")
    results = Results({slow: measured(slow, 2.0), fast: measured(fast, 0.5), FP32: measured(FP32, 1.0)})
    found = row(compared((slow, fast), "decode", 1.5), results, [1, 2])
    assert found.met is True
    assert found.value.startswith("aoti int4 2.00x (2.00 to 2.00)")
    assert "2 threads 2.00x" in found.value
    missed = row(compared((slow, fast), "decode", 2.5), results, [1])
    assert (missed.met, missed.missed_by) == (False, "0.50x")


def test_a_target_without_its_peer_is_not_measured() -> None:
    results = Results({INT8: measured(INT8, 1.0)}, {FP32: "skipped: x is not installed"})
    found = row(compared((INT8,), "image", 1.0), results, [1])
    assert found.met is None
    assert found.value == "executorch fp32: skipped: x is not installed"


def test_a_next_token_without_a_cache_is_told() -> None:
    results = Results({INT8: measured(INT8, 0.5), FP32: measured(FP32, 1.0)})
    results.measured[INT8].cached = False
    assert row(compared((INT8,), "decode", 1.0), results, [1]).value.endswith("without a key-value cache")


def test_bytes_are_a_share_of_the_float_file() -> None:
    results = Results({INT8: measured(INT8, 1.0, 17), FP32: measured(FP32, 1.0, 100)})
    assert row(compared((INT8,), "bytes", 0.16), results, [1]).missed_by == "0.0100 more"
    assert row(compared((INT8,), "bytes", 0.17), results, [1]).met is True


def test_a_contender_that_cannot_be_built_leaves_the_others_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Nothing(Runtime):
        name, packages = "nothing", ()

        def build(self, *unused: object) -> Contender:
            raise AssertionError("children build")

        def open(self, *unused: object) -> dict:
            raise AssertionError("children open")

    monkeypatch.setattr(measuring, "runtime", lambda name: Nothing())
    results = measuring.build([("nothing", LM, "fp32")], "tiny", tmp_path)
    assert not results.measured
    assert results.skipped["nothing", LM, "fp32"].startswith("failed: KeyError")


def test_a_file_that_fails_is_a_row_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(speed.OTHERS, "growth", "benchmarks.no_such_file")
    (found,) = speed._others("growth")
    assert found.met is None
    assert found.value.startswith("failed: ModuleNotFoundError")
    assert isinstance(found, Row)
