"""Calibration: run data through a prepared model in float while its observers look."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from qaware.engines.fake_quant import set_fake_quant
from qaware.errors import QawareError
from qaware.observers import all_reduce, observers
from qaware.plan import Plan

Look = Callable[[bool], None]
"""Switches the observers, for the batches of a pass that do not count."""
_OBSERVER = ".activation_fake_quantizer.observer"


def calibrate(model: nn.Module, run_pass: Callable[[Look], None]) -> None:
    """Observe a prepared model's activations, on all ranks together.

    Every pass sees the float model and starts from the same random state, so that shuffled or augmented
    data is the same each time and on each rank. The caller's random state is put back.

    Args:
        model: prepared; its earlier statistics are forgotten.
        run_pass: runs the calibration batches through the model once. Histograms need it twice.

    Raises:
        QawareError: a layer saw nothing finite.
    """
    watching = list(observers(model))
    set_fake_quant(model, False)
    try:
        for observer in watching:
            observer.reset_parameters()
        for index in range(passes(model)):
            with same_draws():
                _one_pass(model, index, run_pass)
    finally:
        for observer in watching:
            observer.observing, observer.pass_index = False, 0
        set_fake_quant(model, True)
    _refuse_unseen(model)


def passes(model: nn.Module) -> int:
    """How often the calibration data is run."""
    return max((observer.passes for observer in observers(model)), default=0)


def _one_pass(model: nn.Module, index: int, run_pass: Callable[[Look], None]) -> None:
    watching = [observer for observer in observers(model) if index < observer.passes]

    def look(on: bool) -> None:
        for observer in watching:
            observer.observing, observer.pass_index = on, index

    look(True)
    run_pass(look)
    look(False)
    all_reduce(model)


def _refuse_unseen(model: nn.Module) -> None:
    unseen = {id(observer) for observer in observers(model) if not observer.seen}
    names = [name.removesuffix(_OBSERVER) for name, m in model.named_modules() if id(m) in unseen]
    if names:
        raise QawareError(
            f"{', '.join(names)}: calibration saw no finite activation; the input was NaN or infinite in "
            "every batch, or the layer did not run; repair the data, or keep the layer float in the recipe"
        )


def refuse_histogram(plan: Plan) -> None:
    """Refuse histogram observers where the data passes only once.

    Raises:
        QawareError: names the first such layer and the two ways out.
    """
    for name, decision in plan.quantized.items():
        if decision.scheme is not None and decision.scheme.observer == "histogram":
            raise QawareError(
                f"{name}: observer: 'histogram' needs two passes over the same data, and training has one; "
                "use observer: minmax, or PostTrainingQuantization"
            )


@contextlib.contextmanager
def same_draws() -> Iterator[None]:
    """Random numbers start from the same seed inside, and go on outside as if nothing had happened."""
    states = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        random.seed(0)
        np.random.seed(0)
        # torch.manual_seed would also seed an accelerator that nobody has used yet.
        (torch.manual_seed if devices else torch.default_generator.manual_seed)(0)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def require_loader(loader: Any) -> None:
    """Refuse what cannot give batches.

    Raises:
        QawareError: names its type.
    """
    iterable = hasattr(loader, "__iter__") or hasattr(loader, "__getitem__")
    if not iterable or isinstance(loader, (torch.Tensor, str)):
        raise QawareError(
            f"calibration: a {type(loader).__name__} is no loader; give something that yields batches, "
            "e.g. a DataLoader or a list of batches"
        )


class Share:
    """This rank's share of the first batches of a loader that every rank holds whole.

    Rank r takes batches r, r + world, ...; together the ranks see exactly what one process would. Each
    takes as many, since the user's step may communicate: one that has no batch left repeats another.
    """

    def __init__(self, loader: Iterable[Any], count: int) -> None:
        """
        Args:
            loader: batches; what can be iterated only once is kept.
            count: how many batches the ranks take at most, together.
        """
        self.loader = list(itertools.islice(loader, count)) if isinstance(loader, Iterator) else loader
        self.count = count
        self.rank, self.world = _place()
        self.repeats: set[int] = set()
        """Positions of batches that were repeated: they must not be observed."""

    def __iter__(self) -> Iterator[Any]:
        """
        Raises:
            QawareError: there is no batch at all.
        """
        self.repeats.clear()
        with _kept_generators(self.loader):
            batches = itertools.islice(self.loader, self.count)
            for position in itertools.count():
                group = list(itertools.islice(batches, self.world))
                if not group and position == 0:
                    raise QawareError("calibration: the loader gave no batch; give one that has data")
                if not group:
                    return
                if self.rank >= len(group):
                    self.repeats.add(position)
                yield group[self.rank % len(group)]


def _place() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


@contextlib.contextmanager
def _kept_generators(loader: Any) -> Iterator[None]:
    """A loader or sampler with a generator of its own draws the same again the next time."""
    owners = (loader, getattr(loader, "sampler", None))
    found = [g for o in owners if isinstance(g := getattr(o, "generator", None), torch.Generator)]
    states = [generator.get_state() for generator in found]
    try:
        yield
    finally:
        for generator, state in zip(found, states, strict=True):
            generator.set_state(state)
