"""What is said about calibration data: which batch, which tensor, which shapes, how many."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from qaware.calibration_checks import Watch, layer_name, require_enough, shapes, step_failed
from qaware.errors import QawareError
from qaware.observers import MinMaxObserver, MSEObserver

BAD = torch.tensor([1.0, math.inf, math.nan])


@dataclass
class Sample:
    x: Tensor
    name: str = "a"


def complaint(run: Callable[[MinMaxObserver, Watch], None]) -> str:
    observer = MSEObserver()
    observer.observing = True
    with Watch({"net.0.output_fake_quantizer.observer": observer}) as watch:
        run(observer, watch)
    assert not observer._forward_pre_hooks
    with pytest.raises(QawareError) as caught:
        watch.require_finite()
    return str(caught.value)


@pytest.mark.parametrize(
    ("batch", "where"),
    [
        (BAD, ""),
        ([torch.ones(3), BAD], " at [1]"),
        ({"y": torch.ones(3), "x": BAD}, " at ['x']"),
        (Sample(BAD), " at ['x']"),
    ],
)
def test_the_first_broken_batch_is_named_and_the_tensor_in_it(batch: Any, where: str) -> None:
    def run(observer: MinMaxObserver, watch: Watch) -> None:
        for number, (x, given) in enumerate([(torch.ones(3), 1), (BAD, batch), (BAD * 2, BAD[:2])]):
            observer(x)
            watch.batch_done(number, given)

    said = complaint(run)
    assert said.startswith(
        f"calibration: batch 1 (the first is 0) has NaN or infinity{where} (2 of 3 values)"
    )


@pytest.mark.parametrize("told", [True, False])
def test_a_model_that_overflows_by_itself_is_named_by_its_layer(told: bool) -> None:
    def run(observer: MinMaxObserver, watch: Watch) -> None:
        observer(BAD)
        if told:
            watch.batch_done(0, torch.ones(3))

    which = "batch 0 (the first is 0)" if told else "a batch"
    assert complaint(run).startswith(f"calibration: {which} gives net.0 NaN or infinity")


def test_what_is_not_observed_may_be_anything() -> None:
    observer = MinMaxObserver()
    with Watch({"observer": observer}) as watch:
        observer(BAD)
        watch.batch_done(0, BAD)
        observer.observing = True
        observer(torch.ones(3))
        watch.batch_done(1, [torch.ones(3), BAD])  # labels are NaN where they are missing
        watch.require_finite()


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("net.0.activation_fake_quantizer.observer", "net.0"),
        ("net.0.output_fake_quantizer.observer", "net.0"),
        ("net.qaware_operations.add_0.observer", "net.qaware_operations.add_0"),
    ],
)
def test_layer_names(name: str, layer: str) -> None:
    assert layer_name(name) == layer


def test_shapes_of_any_batch() -> None:
    x = torch.ones(4, 2)
    assert shapes(x) == "(4, 2)"
    assert shapes({"a": [x, x[0]], "b": "text"}) == "(4, 2), (2,)"
    assert shapes(Sample(x)) == "(4, 2)"
    assert shapes("text") == "no tensors"
    assert shapes([x] * 5) == "(4, 2), (4, 2), (4, 2), (4, 2), ..."


def test_a_failed_step_is_one_line_with_both_shapes() -> None:
    with pytest.raises(RuntimeError) as caught:
        nn.Linear(3, 2)(torch.ones(4, 2))
    said = step_failed("step", 7, (torch.ones(4, 2), torch.ones(4)), torch.ones(8, 3), caught.value)
    for words in ("step failed on batch 7", "shapes (4, 2), (4,), where it took (8, 3)", "mat1", "give cal"):
        assert words in said
    assert "took" not in step_failed("step", 0, torch.ones(4, 2), None, RuntimeError("a\nb"))
    assert "(a b)" in step_failed("step", 0, torch.ones(4, 2), None, RuntimeError("a\nb"))


@pytest.mark.parametrize(("used", "asked", "line"), [(32, None, False), (5, None, True), (5, 5, False)])
def test_enough_batches(used: int, asked: int | None, line: bool) -> None:
    assert bool(require_enough(used, asked)) is line


def test_not_enough_batches() -> None:
    with pytest.raises(
        QawareError, match=r"^calibration_batches: 32 were asked for and the data has 5; give"
    ):
        require_enough(5, 32)


def _one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    observer = MinMaxObserver()
    observer.observing = True
    with Watch({"net.observer": observer}) as watch:
        batch = BAD if rank == 1 else torch.ones(3)
        observer(batch)
        watch.batch_done(rank, batch)
        try:
            watch.require_finite()
        except QawareError as error:
            Path(folder, str(rank)).write_text(str(error))
    dist.destroy_process_group()


def test_every_rank_raises_what_one_has_seen(tmp_path: Path) -> None:
    mp.spawn(_one_rank, (str(tmp_path),), nprocs=2)
    said = {(tmp_path / str(rank)).read_text() for rank in (0, 1)}
    assert len(said) == 1
    assert said.pop().startswith("calibration: batch 1 (the first is 0) has NaN or infinity")
