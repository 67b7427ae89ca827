"""The quality benchmark on a model of seconds: its rows are computed and written as they should be."""

from __future__ import annotations

import json
from pathlib import Path

import lightning.pytorch as pl
import pytest

from benchmarks import quality
from benchmarks.case import FLOAT, Case, quiet
from benchmarks.quality_mixed import mixed
from benchmarks.quality_ptq import indivisible, ladder, order, recipe
from benchmarks.quality_qat import two_bits
from benchmarks.quality_smooth import smoothing
from benchmarks.rows import Row, table, write
from qaware.lm import CausalLM, TextDataModule


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("quality")
    data = TextDataModule(
        "python-docs",
        tokenizer=512,
        block_size=32,
        max_documents=6,
        max_val_windows=24,
        cache_dir=str(folder / "cache"),
    )
    pl.seed_everything(0, verbose=False)
    model = CausalLM(
        {
            "model_type": "llama",
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 80,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32,
            "tie_word_embeddings": False,
        },
        lr=1e-2,
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=80,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(model, datamodule=data)
    with quiet():
        return Case("tiny", model, data, folder, 0)


def test_layers_that_groups_do_not_divide_are_named_and_keep_8_bits(case: Case) -> None:
    assert indivisible(case) == ["down_proj"]
    first = recipe(case, 4, activation="int8-dynamic")["rules"][0]
    assert first == {"name": "*.down_proj", "scheme": {"bits": 8, "activation": "int8-dynamic"}}


def test_the_ladder_has_a_figure_for_each_width(case: Case) -> None:
    (row,) = ladder(case)
    assert [detail["model"] for detail in row.details] == [f"int{b} rtn" for b in (8, 5, 4, 3, 2)]
    assert row.details[-1]["kl"] > row.details[0]["kl"] > 0


def test_the_order_is_that_of_the_figures(case: Case) -> None:
    (row,) = order(case, 3)
    losses = [detail["d_nats"] for detail in row.details]
    assert losses == sorted(losses)
    loss = {detail["model"].split()[1]: detail["d_nats"] for detail in row.details}
    expected = loss["gptq"] < loss["awq"] < loss["rtn"] and max(loss["mse"], loss["hqq"]) < loss["rtn"]
    assert row.met is expected


def test_mixed_precision_is_measured_on_windows_that_the_search_did_not_see(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.quality_mixed.CHOSEN_ON", 10)
    monkeypatch.setattr("benchmarks.quality_mixed.WIDTHS", (2, 3, 4))
    (row,) = mixed(case, 3)
    gap, left = row.details[0]["d_nats"], row.details[1]["d_nats"]
    assert row.value.startswith(f"{(gap - left) / gap:.1%} of {gap:.3f} nats")
    assert "measured on the other 14" in row.case
    assert gap != row.details[2]["d_nats"]


def test_outliers_are_planted_without_a_change_of_the_function(case: Case) -> None:
    (row,) = smoothing(case)
    assert abs(row.details[0]["d_nats"]) < 1e-4
    assert row.details[1]["d_nats"] > row.details[2]["d_nats"]


def test_training_is_compared_with_a_control_of_as_many_steps(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.quality_qat.STEPS", 3)
    monkeypatch.setattr("benchmarks.quality_qat.TWO_BIT_STEPS", 5)
    (row,) = two_bits(case)
    assert [detail["model"] for detail in row.details] == [
        "float",
        "float control, 5 steps",
        "int2 rtn",
        "int2 qat",
    ]
    rtn, qat = row.details[2]["d_nats"], row.details[3]["d_nats"]
    assert row.value.startswith(f"{(rtn - qat) / rtn:.1%}")
    assert row.details[1]["d_nats"] == 0


def test_a_row_that_fails_leaves_the_others_alone(case: Case) -> None:
    def broken(case: Case) -> list[Row]:
        raise RuntimeError("no such\nruntime")

    (row,) = quality._measured(case, "gptq", broken)
    assert row.met is None
    assert row.value == "failed: no such runtime"


def test_a_model_that_is_not_there_is_said_aloud(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "quality.json"
    rows = quality.measure(tmp_path / "nowhere", tmp_path, ["gptq"], out)
    assert [row.met for row in rows] == [None]
    assert "nowhere has no stories260K" in rows[0].value
    assert json.loads(out.read_text())["rows"][0]["met"] is None


def test_the_file_and_the_table_say_the_same(tmp_path: Path) -> None:
    missed = Row("two bits", "89%", "92%", "90.0%", False, "a case", "2.0%", [{"model": "m", "kl": 0.123456}])
    write([missed], {"cpu": "any"}, tmp_path / "q.json")
    data = json.loads((tmp_path / "q.json").read_text())
    assert {"row", "published", "target", "value", "met"} <= data["rows"][0].keys()
    text = table([missed])
    assert "| two bits | 89% | 92% | 90.0% | no, 2.0% |" in text
    assert "- m: kl 0.1235" in text


def test_the_case_has_a_fingerprint_and_float_scores(case: Case) -> None:
    assert case.fingerprint == case.score(FLOAT, "float").fingerprint
    with pytest.raises(RuntimeError, match="has no score in tract"):
        case.score(FLOAT, "tract")
