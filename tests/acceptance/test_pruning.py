"""ModelPruning and quantization in one run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, ModelPruning

from .data import images, sequences
from .models import Classifier
from .runs import INT4, STATIC, make, qat, trainer, validate


def pruning(**options: Any) -> ModelPruning:
    """Half of what is left after each of the two epochs."""
    return ModelPruning("l1_unstructured", amount=0.5, **options)


def ordered(ours: Any, theirs: Any, first: bool) -> list[Any]:
    return [ours, theirs] if first else [theirs, ours]


def zeros(result: Any, names: set[str]) -> dict[str, float]:
    """The share of integers that stand for zero, of each layer."""
    weights = {name: result.model.weights[name] for name in names}
    return {name: (weight.dequantize() == 0).float().mean().item() for name, weight in weights.items()}


@pytest.mark.parametrize("permanent", [True, False], ids=["permanent", "masked"])
@pytest.mark.parametrize("unstructured", [True, False], ids=["global", "layerwise"])
@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
@pytest.mark.parametrize("recipe", [INT4, STATIC])
def test_case_10_pruned_weights_are_zero_as_integers(
    recipe: str, first: bool, unstructured: bool, permanent: bool
) -> None:
    """Lightning #11047: pruning and QAT in one run, in both orders of the callbacks. Half of the weights
    twice leaves three quarters of zeros, and the integers keep every one of them."""
    layers = {"body.up", "body.down", "body.head"}
    module = make()
    parameters = [(module.get_submodule(name), "weight") for name in sorted(layers)]
    prune = pruning(
        parameters_to_prune=parameters,
        use_global_unstructured=unstructured,
        make_pruning_permanent=permanent,
    )
    callback = qat(recipe)
    trainer(*ordered(callback, prune, first)).fit(module, sequences(), sequences(9))
    found = zeros(callback.result, layers)
    total = sum(found[n] * module.get_submodule(n).weight.numel() for n in layers)
    assert total / sum(module.get_submodule(n).weight.numel() for n in layers) >= 0.74
    if not unstructured:
        assert min(found.values()) >= 0.74
    for name in layers:
        weight = module.get_submodule(name).weight
        pruned = weight == 0
        assert pruned.float().mean() >= 0.4 or unstructured
        assert bool((callback.result.model.weights[name].dequantize()[pruned] == 0).all())


@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
def test_case_10_the_integers_compute_what_the_pruned_model_does(first: bool) -> None:
    """Lightning #11047 with masks that were not made permanent: the weight is a product, computed anew before
    each forward pass, and must be fresh when it is converted."""
    module, callback = make(), qat(STATIC)
    prune = pruning(make_pruning_permanent=False, parameters_to_prune=[(module.body.up, "weight")])
    trainer(*ordered(callback, prune, first)).fit(module, sequences(), sequences(9))
    assert callback.result is not None
    assert validate(callback.result.model.module) == pytest.approx(validate(module), abs=1e-6)
    assert zeros(callback.result, {"body.up"})["body.up"] >= 0.74


def test_case_10_without_a_list_pruning_takes_every_parameter() -> None:
    """ModelPruning's default also masks biases, embeddings and norms."""
    module, callback = make(Classifier), qat(STATIC, target="net")
    trainer(callback, pruning(use_global_unstructured=True)).fit(module, images(), images(1))
    assert callback.result is not None
    assert sum(zeros(callback.result, {"0", "3", "5"}).values()) / 3 >= 0.4


@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
def test_case_11_pruning_mixed_precision_and_checkpoints(first: bool, tmp_path: Path) -> None:
    """Lightning #13411: QAT, ModelPruning, half precision and a resume crashed together. A checkpoint of such
    a run is tested as it was trained, resumed from, and loads without running code."""
    module, callback = make(), qat(STATIC)
    keep = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    run = trainer(*ordered(callback, pruning(), first), keep, precision="bf16-mixed")
    run.fit(module, sequences(), sequences(9))
    after = run.test(module, sequences(9), verbose=False)
    assert run.test(module, sequences(9), ckpt_path="last", verbose=False) == after
    last = tmp_path / "last.ckpt"
    fresh = trainer(qat(STATIC), precision="bf16-mixed")
    assert fresh.test(make(seed=5), sequences(9), ckpt_path=last, verbose=False) == after
    saved = torch.load(last, weights_only=True)
    assert not [name for name in saved["state_dict"] if name.endswith(("_orig", "_mask"))]

    again, more = make(seed=77), qat(STATIC)
    run = trainer(*ordered(more, pruning(), first), precision="bf16-mixed", max_epochs=3)
    run.fit(again, sequences(), sequences(9), ckpt_path=last)
    assert len(again.losses) == 6
    assert again.losses[-1] < module.losses[0]
    assert zeros(more.result, {"body.up"})["body.up"] >= 0.4


@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
def test_case_11_masks_that_stay_in_mixed_precision(first: bool, tmp_path: Path) -> None:
    """Lightning #13411 with ``make_pruning_permanent=False``. (Lightning itself can neither resume such a run
    nor start a second one with the same ModelPruning, in float either.)"""
    module, callback = make(), qat(STATIC)
    keep = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    prune = pruning(make_pruning_permanent=False)
    trainer(*ordered(callback, prune, first), keep, precision="bf16-mixed").fit(
        module, sequences(), sequences(9)
    )
    assert callback.result is not None
    assert min(zeros(callback.result, {"body.up", "body.down", "body.head"}).values()) >= 0.4
    converted = validate(callback.result.model.module, precision="bf16-mixed")
    assert converted == pytest.approx(validate(module, precision="bf16-mixed"), abs=1e-6)
