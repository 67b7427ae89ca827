"""Prepare, convert and load a LightningModule outside a Trainer, and what the callback uses inside one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import lightning.pytorch as pl

from qaware.callbacks.data import find_target
from qaware.callbacks.examples import example_of_array
from qaware.callbacks.hooks import override
from qaware.callbacks.nested import detached_copy
from qaware.callbacks.restoring import apply_plan, restore_structure
from qaware.callbacks.state import (
    CONVERTED,
    PREPARED,
    QuantizationState,
    get_state,
    require_same_recipe,
    require_trainable,
    set_state,
)
from qaware.engines.base import QuantizedModel
from qaware.engines.choose import engine_for, lay_out
from qaware.engines.example import Example
from qaware.errors import QawareError
from qaware.plan import Plan
from qaware.recipe import Recipe

Module = TypeVar("Module", bound=pl.LightningModule)


def prepare(
    pl_module: Module,
    recipe: str | Path | Mapping[str, Any] | Recipe,
    target: str | None = None,
    export: Sequence[str] = (),
    engine: str = "auto",
) -> Module:
    """Insert fake-quantizers into ``pl_module`` in place, and return it.

    The callback does this itself; call it where the module must be prepared before the Trainer sees it:
    strategies that train in other processes (``ddp_spawn``, ``ddp_fork``, ``ddp_notebook``), and the loading
    of sharded checkpoints. A module that builds its layers in ``configure_model`` is prepared right after.

    Args:
        pl_module: float. Where convolutions or activations are to be integers, its ``example_input_array``
            shows where they are rounded.
        recipe: name, path of a YAML file, plain data, or a :class:`qaware.Recipe`.
        target: name of the submodule to quantize; None for the whole module.
        export: runtimes that the model is for, by which the engine is chosen.
        engine: ``auto``, ``modules``, ``eager`` or ``graph``.

    Raises:
        QawareError: the recipe does not fit the model, or the module was prepared under another recipe.
    """
    recipe = Recipe.load(recipe)
    if is_built(pl_module):
        _prepare_now(pl_module, recipe, target, export, engine)
    else:

        def configure_model(module: pl.LightningModule, original: Any) -> None:
            original()
            _prepare_now(module, recipe, target, export, engine)

        override(pl_module, "configure_model", configure_model)
    return pl_module


def convert(pl_module: pl.LightningModule) -> QuantizedModel:
    """Integers from a prepared module, as at the end of fit. ``pl_module`` itself stays trainable.

    Raises:
        QawareError: the module is not prepared.
    """
    state = get_state(pl_module)
    if state is None or state.phase != PREPARED:
        raise QawareError(
            f"{type(pl_module).__name__}: is {'float' if state is None else state.phase}; convert() takes a "
            "module that prepare(), load_from_checkpoint() or the callback prepared"
        )
    prepared = detached_copy(pl_module)
    quantized: QuantizedModel = engine_for(state.plan).convert(
        find_target(prepared, state.target), state.plan
    )
    set_state(prepared, QuantizationState(CONVERTED, state.plan, state.target))
    return quantized


def load_from_checkpoint(cls: type[Module], checkpoint_path: str | Path, **kwargs: Any) -> Module:
    """``cls.load_from_checkpoint`` for a checkpoint of quantization-aware training: the module comes back
    prepared, with its fake-quantizers on if they were, in evaluation mode. A float checkpoint gives a float
    module.

    Args:
        cls: the LightningModule's class.
        checkpoint_path: a ``.ckpt`` file.
        kwargs: what ``cls.load_from_checkpoint`` takes: ``map_location``, ``strict``, hyperparameters.
    """

    # Lightning offers no moment between building the module and loading its weights but this hook.
    own, inherited = vars(cls).get("on_load_checkpoint"), cls.on_load_checkpoint

    def on_load_checkpoint(self: Module, checkpoint: dict[str, Any]) -> None:
        restore_structure(self, checkpoint)
        inherited(self, checkpoint)

    cls.on_load_checkpoint = on_load_checkpoint  # type: ignore[assignment,method-assign]
    try:
        module: Module = cls.load_from_checkpoint(checkpoint_path, **kwargs)
    finally:
        if own is None:
            del cls.on_load_checkpoint
        else:
            cls.on_load_checkpoint = own  # type: ignore[method-assign]
    return module.eval()


def is_built(pl_module: pl.LightningModule) -> bool:
    """Whether there are layers yet."""
    return any(True for _ in pl_module.parameters())


def _prepare_now(
    pl_module: pl.LightningModule, recipe: Recipe, target: str | None, export: Sequence[str], engine: str
) -> None:
    require_continuation(pl_module, recipe, target)
    if get_state(pl_module) is None:
        plan = recipe.match(find_target(pl_module, target))
        apply_plan(pl_module, _laid_out(pl_module, plan, target, export, engine), target)


def _laid_out(
    pl_module: pl.LightningModule, plan: Plan, target: str | None, export: Sequence[str], engine: str
) -> Plan:
    def find() -> Example:
        example = example_of_array(pl_module, target)
        if example is None:
            raise QawareError(
                f"{type(pl_module).__name__}: integer activations need one batch, to see where the model "
                "rounds them; set self.example_input_array in the LightningModule"
            )
        return example

    return lay_out(plan, find_target(pl_module, target), find, export, engine, training=True)[0]


def require_continuation(pl_module: pl.LightningModule, recipe: Recipe, target: str | None) -> None:
    """Refuse a module that was converted, or prepared in another way."""
    state = get_state(pl_module)
    if state is not None:
        require_trainable(pl_module)
        require_same_recipe("module", state.plan.recipe, state.target, recipe, target)
