"""Quantize a plain ``nn.Module``, without a Trainer."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchao.utils import TorchAOBaseTensor

from qaware.calibration import Look, Share, calibrate, require_loader, same_draws
from qaware.calibration_checks import DEFAULT_BATCHES, require_enough, step_failed
from qaware.copying import deep_copy
from qaware.engines.base import QuantizedModel
from qaware.engines.choose import engine_for, lay_out
from qaware.engines.example import Example, capture
from qaware.errors import QawareError
from qaware.plan import Plan
from qaware.recipe import Recipe

log = logging.getLogger(__name__)

Step = Callable[[nn.Module, Any], Any]


def quantize(
    model: nn.Module,
    recipe: str | dict[str, Any] | Recipe,
    calibration: Iterable[Any] | None = None,
    calibration_batches: int | None = None,
    step: Step | None = None,
    runtimes: Sequence[str] = (),
    engine: str = "auto",
) -> QuantizedModel:
    """Post-training quantization of a copy of ``model``, which itself is not changed.

    Args:
        model: any module, on any device, training or not.
        recipe: name, path of a YAML file, plain data, or a :class:`qaware.Recipe`.
        calibration: a loader or list of batches, run through the model in evaluation mode and without
            gradients. Only recipes with static activations need it, others leave it alone. A tensor is the
            one argument of ``forward``; of a mapping or dataclass ``forward`` gets what it has a keyword for;
            of a tuple or list as many items as it takes by position, so that labels behind the inputs are
            left out (where it also has optional arguments, ``step`` must say which is which). Under
            ``torch.distributed`` every process gives the whole loader.
        calibration_batches: batches to observe; an error where there are fewer. None: up to 32.
        step: runs a batch of any other kind: ``step(model, batch)``.
        runtimes: what it will be exported to, by which the engine is chosen.
        engine: ``auto``, ``modules``, ``eager`` or ``graph``.

    Raises:
        QawareError: the recipe fits nothing or needs data that is not there, a batch does not fit
            ``forward``, or a layer saw nothing finite.
    """
    _refuse_quantized(model)
    plan = Recipe.load(recipe).match(model)
    plan.require_possible()
    if plan.needs_batches:
        share = _share(calibration, calibration_batches, plan.recipe)
    # Tensors made in inference mode, which the caller may be in, could not be exported later.
    with torch.inference_mode(False), torch.no_grad():
        work = deep_copy(model).eval()
        plan, choice = lay_out(plan, work, lambda: _example(work, share, step or _forward), runtimes, engine)
        log.info("%s; engine %s (%s)", plan.summary(), choice.engine, choice.reason)

        def run_pass(look: Look) -> None:
            _run(work, share, calibration_batches, step or _forward, look)

        return _convert(work, plan, run_pass)


def _convert(work: nn.Module, plan: Plan, run_pass: Callable[[Look], None]) -> QuantizedModel:
    """Prepare, calibrate, round and convert a float model in place."""
    rounder = None
    if plan.recipe.rounds:
        from qaware.rounding.recording import record
        from qaware.rounding.rounder import Rounder

        rounder = Rounder(work, plan, lambda: record(work, run_pass))
        plan = rounder.plan
    engine_for(plan).prepare(work, plan)
    if plan.needs_calibration:
        calibrate(work, run_pass)
    report = None if rounder is None else rounder.round(work)
    converted: QuantizedModel = engine_for(plan).convert(work, plan)
    converted.rounding = report
    return converted


def _example(model: nn.Module, share: Share, step: Step) -> Example:
    """What enters ``model`` for the first batch."""
    with same_draws():
        batch = next(iter(share))
    example = capture(model, lambda: step(model, batch))
    if example is None:
        raise QawareError("step: did not call the model; it must be a function (model, batch) that does")
    return example.to(_device(model))


def _device(model: nn.Module) -> torch.device:
    return next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))


def _refuse_quantized(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if hasattr(module, "weight_fake_quantizer"):
            raise QawareError(f"{name}: is prepared for QAT; use qaware.convert, or give a float model")
        if isinstance(getattr(module, "weight", None), TorchAOBaseTensor):
            raise QawareError(f"{name}: has an integer weight already; give the float model")


def _share(calibration: Any, batches: int | None, recipe: Recipe) -> Share:
    if batches is not None and batches < 1:
        raise QawareError(f"calibration_batches: {batches} must be at least 1")
    if calibration is None:
        why = f"rounding: {recipe.rounding!r}" if recipe.needs_data else "static activations"
        raise QawareError(f"calibration: recipe {recipe.name!r} has {why} and so needs data; give a loader")
    require_loader(calibration)
    if isinstance(calibration, Mapping):
        raise QawareError("calibration: a mapping is one batch; give a loader, or a list of batches")
    return Share(calibration, batches or DEFAULT_BATCHES)


def _run(model: nn.Module, share: Share, asked: int | None, step: Step, look: Look) -> None:
    device = _device(model)
    good: Any = None
    for position, batch in enumerate(share):
        look(position not in share.repeats)
        try:
            step(model, _move(batch, device))
        except QawareError:
            raise
        except Exception as error:  # whatever a model makes of a batch that it does not know
            what = "the model" if step is _forward else "step"
            message = step_failed(what, share.number(position), batch, good, error)
            raise QawareError(message) from error
        look.done(share.number(position), batch)
        good = batch
    line = require_enough(share.used, asked)
    if line and look.index == 0:
        log.info(line)


def _move(batch: Any, device: torch.device) -> Any:
    """Tensors inside plain containers, dataclasses, and whatever has a ``to``."""
    if callable(getattr(batch, "to", None)):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _move(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        items = [_move(item, device) for item in batch]
        return type(batch)(*items) if hasattr(batch, "_fields") else type(batch)(items)
    if _is_dataclass(batch):
        moved = copy.copy(batch)
        for name, value in _fields(batch).items():
            object.__setattr__(moved, name, _move(value, device))
        return moved
    return batch


def _is_dataclass(batch: Any) -> bool:
    return dataclasses.is_dataclass(batch) and not isinstance(batch, type)


def _fields(batch: Any) -> dict[str, Any]:
    return {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}


def _forward(model: nn.Module, batch: Any) -> None:
    """Call ``model`` with what its ``forward`` takes of ``batch``."""
    signature = inspect.signature(model.forward)
    args, kwargs = _arguments(signature, batch)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise QawareError(
            f"calibration: a batch of type {_describe(batch)} does not fit forward{signature} ({error}); "
            "give step=, a function (model, batch) that calls the model"
        ) from error
    model(*args, **kwargs)


def _arguments(signature: inspect.Signature, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    kinds = [parameter.kind for parameter in signature.parameters.values()]
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping) or _is_dataclass(batch):
        given = batch if isinstance(batch, Mapping) else _fields(batch)
        if inspect.Parameter.VAR_KEYWORD in kinds:
            return (), dict(given)
        takes = {
            n for n, p in signature.parameters.items() if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)
        }
        return (), {key: value for key, value in given.items() if key in takes}
    if isinstance(batch, (tuple, list)):
        if inspect.Parameter.VAR_POSITIONAL in kinds:
            return tuple(batch), {}
        return _positional(signature, batch), {}
    raise QawareError(
        f"calibration: a batch of type {type(batch).__name__} has no obvious way into forward; "
        "give step=, a function (model, batch) that calls the model"
    )


def _positional(signature: inspect.Signature, batch: Sequence[Any]) -> tuple[Any, ...]:
    """As many items as ``forward`` takes, unless it is not clear how many that are."""
    places = [
        p for p in signature.parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    needed = sum(p.default is p.empty for p in places)
    if needed < len(batch) and needed < len(places):
        optional = ", ".join(p.name for p in places[needed:][:3])
        raise QawareError(
            f"calibration: are the items of a batch of {len(batch)} after the first {needed} labels, or for "
            f"the optional arguments ({optional}) of forward? give step=, a function (model, batch)"
        )
    return tuple(batch[: len(places)])


def _describe(batch: Any) -> str:
    """The type of a batch and what it holds."""
    name = type(batch).__name__
    if isinstance(batch, Mapping):
        return f"{name} with keys {', '.join(map(str, batch))}"
    return f"{name} of {len(batch)}" if isinstance(batch, (tuple, list)) else name
