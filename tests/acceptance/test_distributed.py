"""Two processes on gloo, started by torchrun, against one process; see ``ranks`` for what runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from . import ranks

Results = list[dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def two(folder: Path) -> Results:
    """What each of two ranks found, for every job."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launch, "-m", "acceptance.ranks", str(folder)]
    tests = Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tests, env=os.environ, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def one(job: str, folder: Path) -> dict[str, Any]:
    """The same job in this process."""
    return json.loads(json.dumps(ranks.JOBS[job](1, folder)))


def test_case_21_ranges_are_those_of_all_ranks(two: Results, folder: Path) -> None:
    """pytorch #85627 #33648, TensorRT #2650: under DDP the observers knew rank 0 only. Rank 1 is fed data
    that is 5 times larger."""
    first, second = (result["train"]["ranges"] for result in two)
    assert first == second
    alone = one("train", folder)["ranges"]
    assert first[0] == alone[0], "what enters the model does not depend on the training: exact"
    for range_of_two, range_of_one in zip(first, alone, strict=True):
        assert range_of_two == pytest.approx(range_of_one, rel=0.1)
    rank_0_only = ranks.images().dataset.tensors[0][::2].max().item()
    assert first[0][1] > 2 * rank_0_only


def test_a_folded_batch_norm_ships_the_same_on_every_rank(two: Results) -> None:
    """Each rank's running statistics are its own after the last step, and the integers are made of them."""
    assert two[0]["folded"] == two[1]["folded"]
    assert two[0]["folded"]["norms"] == ["1"]


def test_ranks_keep_the_same_weights_and_train_like_one_process(two: Results, folder: Path) -> None:
    assert two[0]["train"]["weights"] == two[1]["train"]["weights"]
    pairs = zip(*(result["replicate"]["losses"] for result in two), strict=True)
    assert [sum(pair) / 2 for pair in pairs] == pytest.approx(one("replicate", folder)["losses"], abs=1e-3)


def test_case_22_calibration_does_not_depend_on_the_processes(two: Results, folder: Path) -> None:
    """llm-compressor #2391 #2471: min-max and histogram ranges, identical for 1 and 2 processes."""
    assert two[0]["calibrate"] == two[1]["calibrate"] == one("calibrate", folder)
    assert two[0]["calibrate"]["minmax"] != two[0]["calibrate"]["histogram"]


def test_case_23_perplexity_counts_every_sequence_once(two: Results, folder: Path) -> None:
    """Lightning's sampler repeats sequences to make shares even, and ``sync_dist`` averages means: 61
    sequences give the same bits in 1 and 2 processes."""
    assert two[0]["score"] == two[1]["score"] == one("score", folder)
    assert len(two[0]["score"]["losses"]) == 61


def test_shares_of_the_users_own_making_are_scored_together(two: Results, folder: Path) -> None:
    assert two[0]["score_shares"] == two[1]["score_shares"] == one("score_shares", folder)
    assert two[0]["score_shares"]["count"] == 61 * 7


def test_case_39_the_integer_model_is_in_the_table(two: Results, folder: Path) -> None:
    """An integer model cannot be given to a DDP Trainer, which broadcasts its tensors; it is scored all the
    same, by both ranks, and files are written once."""
    stages = two[1]["train"]["stages"]
    assert stages == {stage: two[0]["train"]["stages"][stage] for stage in ("converted", "prepared")}
    assert stages["converted"] == stages["prepared"]
    rows = (folder / "train2" / "results.jsonl").read_text().splitlines()
    exported = two[0]["train"]["artifacts"]
    assert [json.loads(row)["stage"] for row in rows] == ["float", "prepared", "converted", *exported]
    assert not list(folder.glob("train2-*"))


def test_the_first_rank_exports_while_the_others_wait(two: Results, folder: Path) -> None:
    pytest.importorskip("tract")
    assert two[0]["train"]["artifacts"] == ["tract"]
    assert two[1]["train"]["artifacts"] == []
    assert two[0]["train"]["stages"]["tract"] == pytest.approx(
        two[0]["train"]["stages"]["converted"], abs=0.02
    )
    assert len(list((folder / "train2").glob("*.nnef.tgz"))) == 1


@pytest.mark.parametrize("saved", ["sharded", "whole"])
def test_case_25_fully_sharded_training(two: Results, saved: str) -> None:
    """ao #762, torchtune #1489, ModelOpt #318: FSDP2 trains like DDP, resumes exactly from sharded and from
    whole checkpoints, and the gathered model converts to what was trained."""
    for result in two:
        found = result["shard"][saved]
        assert found["losses"] == result["replicate"]["losses"]
        assert found["resumed"] == found["losses"]
        assert found["stages"]["converted"] == found["stages"]["prepared"]
    assert two[0]["shard"][saved]["stages"] == two[1]["shard"][saved]["stages"]


@pytest.mark.parametrize("saved", ["sharded", "whole"])
def test_a_sharded_checkpoint_needs_a_prepared_model(two: Results, saved: str) -> None:
    """These strategies load weights before a callback could prepare the model: refused, with the way out."""
    refused, value = two[0]["shard"][saved]["validated"]
    assert "qaware.prepare(model, recipe, target) first" in refused
    assert value == two[0]["shard"][saved]["logged"]
