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

from qaware.buffers import own_buffers
from qaware.calibration_checks import Watch, layer_name
from qaware.engines.fake_quant import set_fake_quant
from qaware.errors import QawareError
from qaware.observers import KINDS, MinMaxObserver, all_reduce, observers
from qaware.plan import Plan


class Look:
    """The observers of one pass, as the code that runs the batches sees them."""

    def __init__(self, watching: list[MinMaxObserver], index: int, watch: Watch) -> None:
        """
        Args:
            watching: the observers that look in this pass.
            index: of the pass, from 0.
            watch: is told of every batch.
        """
        self.watching = watching
        self.index = index
        self.watch = watch

    def __call__(self, on: bool) -> None:
        """Switch the observers, for the batches of a pass that do not count."""
        for observer in self.watching:
            observer.observing, observer.pass_index = on, self.index

    def done(self, number: int, batch: Any) -> None:
        """After the model ran: an error about what it saw can name ``batch`` then.

        Args:
            number: of the batch in the loader, from 0.
            batch: as the loader gave it.
        """
        self.watch.batch_done(number, batch)


def calibrate(model: nn.Module, run_pass: Callable[[Look], None]) -> None:
    """Observe a prepared model's activations, on all ranks together.

    Every pass sees the float model and starts from the same random state and buffers, so that shuffled or
    augmented data is the same each time and on each rank. The caller's random state is put back, and the
    model's own buffers are as they were.

    Args:
        model: prepared; its earlier statistics are forgotten.
        run_pass: runs the calibration batches through the model once. Histograms need it twice.

    Raises:
        QawareError: a layer saw NaN or infinity in some batch, or nothing at all.
    """
    watching = list(observers(model))
    set_fake_quant(model, False)
    try:
        for observer in watching:
            observer.reset_parameters()
        with Watch({n: m for n, m in model.named_modules() if isinstance(m, MinMaxObserver)}) as watch:
            for index in range(passes(model)):
                with same_draws(), own_buffers(model, but=(MinMaxObserver,)):
                    _one_pass(model, Look([o for o in watching if index < o.passes], index, watch), run_pass)
    finally:
        for observer in watching:
            observer.observing, observer.pass_index = False, 0
        set_fake_quant(model, True)
    _refuse_unseen(model)


def passes(model: nn.Module) -> int:
    """How often the calibration data is run."""
    return max((observer.passes for observer in observers(model)), default=0)


def _one_pass(model: nn.Module, look: Look, run_pass: Callable[[Look], None]) -> None:
    look(True)
    run_pass(look)
    look(False)
    look.watch.require_finite()
    all_reduce(model)


def _refuse_unseen(model: nn.Module) -> None:
    unseen = {id(observer) for observer in observers(model) if not observer.seen}
    names = [layer_name(name) for name, m in model.named_modules() if id(m) in unseen]
    if names:
        raise QawareError(
            f"{', '.join(dict.fromkeys(names))}: calibration saw no activation, so the layer did not run; "
            "give data on which it runs, or keep it float in the recipe"
        )


def refuse_several_passes(plan: Plan) -> None:
    """Refuse observers that see the same data twice where it passes only once.

    Raises:
        QawareError: names the first such layer and the two ways out.
    """
    for name, decision in plan.quantized.items():
        observer = decision.scheme.observer if decision.scheme is not None else "minmax"
        if KINDS[observer].passes > 1:
            raise QawareError(
                f"{name}: observer: {observer!r} needs two passes over the same data, and training has one; "
                "use observer: moving-average or minmax, or PostTrainingQuantization"
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
        self.used = 0
        """Batches of the last pass, of all ranks together."""

    def number(self, position: int) -> int:
        """Which batch of the loader the one at ``position`` of this rank's share is, from 0."""
        return position * self.world + self.rank

    def __iter__(self) -> Iterator[Any]:
        """
        Raises:
            QawareError: there is no batch at all.
        """
        self.repeats.clear()
        self.used = 0
        with _kept_generators(self.loader):
            batches = itertools.islice(self.loader, self.count)
            for position in itertools.count():
                group = list(itertools.islice(batches, self.world))
                if not group and position == 0:
                    raise QawareError("calibration: the loader gave no batch; give one that has data")
                if not group:
                    return
                self.used += len(group)
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
