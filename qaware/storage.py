"""A converted model as one file of plain tensors and plain data."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qaware.copying import deep_copy
from qaware.engines.base import ActivationRange, QuantizedModel, QuantizedWeight
from qaware.engines.choose import engine_for
from qaware.engines.eager import fold_shapes
from qaware.engines.modules import ModulesEngine
from qaware.errors import QawareError
from qaware.files import atomic
from qaware.layout import Layout
from qaware.matching import QUANTIZABLE
from qaware.plan import Decision, Plan
from qaware.recipe import Recipe
from qaware.scheme import Scheme

FORMAT, VERSION = "qaware quantized model", 1
_SHOWN = 4
_WEIGHT = ("weight", "weight_scale", "weight_zero_point")
"""What a layer's integers are kept in; they are saved apart."""


def save(quantized: QuantizedModel, path: Path) -> None:
    """Write ``quantized`` to ``path``, all at once or not at all.

    ``torch.load(path, weights_only=True)`` reads the file, also where torchao is not installed:

    ``recipe``, ``decisions``
        the plan, as plain data;
    ``layers``
        by module name: ``data``, int8 (rows, width) or the float16 weight; ``scale``, float32
        (rows, width / block), and ``zero_point``, int8 of the same shape, or None; ``dtype`` to compute in;
    ``activations``, ``outputs``
        by module name: ``scale`` and ``zero_point`` of a static input; by site, of an integer result;
    ``layout``
        where activations are rounded, or None;
    ``tensors``, ``caches``
        by name: all that stays float; caches are the buffers that no checkpoint holds.

    Raises:
        QawareError: the file cannot be written.
    """
    layout = quantized.plan.layout
    modules = dict(quantized.module.named_modules())
    tensors, caches = _float_tensors(quantized.module, quantized.weights)
    once: dict[int, Tensor] = {}
    data = {
        "format": FORMAT,
        "version": VERSION,
        "recipe": quantized.plan.recipe.to_dict(),
        "decisions": [_decision_data(decision) for decision in quantized.plan.decisions],
        "layers": {name: _layer_data(modules[name], w, once) for name, w in quantized.weights.items()},
        "activations": {name: dataclasses.asdict(a) for name, a in quantized.activations.items()},
        "outputs": {name: dataclasses.asdict(a) for name, a in quantized.outputs.items()},
        "layout": None if layout is None else layout.to_dict(),
        "tensors": {name: _plain(tensor, once) for name, tensor in tensors.items()},
        "caches": {name: _plain(tensor, once) for name, tensor in caches.items()},
    }
    with atomic(path) as temporary, temporary.open("wb") as file:
        torch.save(data, file)


def load_quantized(path: str | Path, model: nn.Module) -> QuantizedModel:
    """The model that :meth:`QuantizedModel.save` wrote.

    Args:
        path: the file.
        model: the float architecture, with any weights, also on the meta device. It is not changed.

    Returns:
        A model that computes exactly what the saved one did, on the device of ``model`` (for meta the CPU).

    Raises:
        QawareError: the file is none of ours, or ``model`` is another architecture; says what differs.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    data = _read(Path(path), torch.device("cpu") if device.type == "meta" else device)
    layout = None if data.get("layout") is None else Layout.from_dict(data["layout"])
    decisions = tuple(_decision(d) for d in data["decisions"])
    plan = Plan(Recipe.from_dict(data["recipe"]), decisions, layout)
    model = deep_copy(model)
    if layout is not None:
        _require_sites(path, model, layout)
        fold_shapes(model, layout)
    _refuse_other_architecture(path, data, model)
    weights = {name: _weight(layer, plan.layer(name)) for name, layer in data["layers"].items()}
    activations = {name: ActivationRange(**a) for name, a in data["activations"].items()}
    _fill(model, data)
    if layout is None:
        return ModulesEngine().rebuild(model, plan, weights, activations)
    outputs = {name: ActivationRange(**a) for name, a in data["outputs"].items()}
    rebuilt: QuantizedModel = engine_for(plan).rebuild(model, plan, weights, activations, outputs)
    return rebuilt


def _require_sites(path: str | Path, model: nn.Module, layout: Layout) -> None:
    """Refuse an architecture without the modules that were folded or watched."""
    names = {name for name, _ in model.named_modules()}
    wanted = [site.batch_norm for site in layout.layers if site.batch_norm]
    wanted += [site.module for site in layout.layers] + [site.owner for site in layout.operations]
    missing = [name for name in wanted if name not in names]
    if missing:
        raise QawareError(
            f"{path}: {type(model).__name__} is another architecture: it has no {missing[0]}; give the "
            "float model that was quantized"
        )


def _float_tensors(
    model: nn.Module, quantized: Collection[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """All parameters and buffers by name but the weights of ``quantized`` modules; caches apart."""
    tensors: dict[str, Tensor] = {}
    caches: dict[str, Tensor] = {}
    for prefix, module in model.named_modules():
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and not (key in _WEIGHT and prefix in quantized):
                held = caches if key in module._non_persistent_buffers_set else tensors
                held[f"{prefix}.{key}" if prefix else key] = tensor
    return tensors, caches


def _plain(tensor: Tensor, once: dict[int, Tensor]) -> Tensor:
    """On the CPU; the same object for the same tensor, so that ties survive."""
    return once.setdefault(id(tensor), tensor.detach().cpu())


def _decision_data(decision: Decision) -> dict[str, Any]:
    fields = {f.name: getattr(decision, f.name) for f in dataclasses.fields(decision)}
    return {**fields, "scheme": None if decision.scheme is None else decision.scheme.to_dict()}


def _decision(data: dict[str, Any]) -> Decision:
    scheme = data["scheme"]
    return Decision(**{**data, "scheme": None if scheme is None else Scheme(**scheme)})


def _layer_data(module: Any, weight: QuantizedWeight, once: dict[int, Tensor]) -> dict[str, Any]:
    parts = {"data": weight.data, "scale": weight.scale, "zero_point": weight.zero_point}
    tensors = {key: None if part is None else _plain(part, once) for key, part in parts.items()}
    dtype = getattr(module, "dtype", module.weight.dtype)
    return {**tensors, "dtype": str(dtype).removeprefix("torch.")}


def _weight(layer: dict[str, Any], decision: Decision) -> QuantizedWeight:
    assert decision.scheme is not None
    return QuantizedWeight(layer["data"], layer["scale"], layer["zero_point"], decision.scheme.weight)


def _read(path: Path, device: torch.device) -> dict[str, Any]:
    try:
        file = path.open("rb")
    except OSError as error:
        raise QawareError(f"{path}: cannot be read ({error.strerror or error})") from error
    with file:
        try:
            data = torch.load(file, map_location=device, weights_only=True)
        except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
            raise QawareError(f"{path}: is damaged, or not written by QuantizedModel.save") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise QawareError(
            f"{path}: was not written by QuantizedModel.save; load a checkpoint as a checkpoint"
        )
    if data["version"] > VERSION:
        raise QawareError(
            f"{path}: has format version {data['version']}, this qaware reads up to {VERSION}; update qaware"
        )
    return data


def _refuse_other_architecture(path: str | Path, data: dict[str, Any], model: nn.Module) -> None:
    layers = {d["module"]: d for d in data["decisions"] if d["scheme"] and d["module"] in data["layers"]}
    types = {name: decision["type"] for name, decision in layers.items()}
    saved = {f"{name} ({types[name]})": tuple(decision["shape"]) for name, decision in layers.items()}
    saved |= {name: tuple(tensor.shape) for name, tensor in data["tensors"].items()}
    here = {
        f"{name} ({_kind(module)})": tuple(weight.shape)
        for name, module in model.named_modules()
        if name in types and isinstance(weight := getattr(module, "weight", None), Tensor)
    }
    here |= {n: tuple(t.shape) for n, t in _float_tensors(model, data["layers"])[0].items()}
    problems = [f"{name} is missing" for name in saved if name not in here]
    problems += [f"{name} is not in the file" for name in here if name not in saved]
    both = [(name, shape, here[name]) for name, shape in saved.items() if name in here]
    problems += [f"{name} is {own}, in the file {shape}" for name, shape, own in both if own != shape]
    if problems:
        more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise QawareError(
            f"{path}: {type(model).__name__} is another architecture: {'; '.join(problems[:_SHOWN])}{more}; "
            f"give the float model that was quantized{_inside(data['layers'], model)}"
        )


_KINDS = tuple(getattr(nn, name) for name in QUANTIZABLE)


def _kind(module: nn.Module) -> str:
    """``Linear``, ``Embedding`` and so on for exactly these, as in a plan."""
    cls = type(module)
    return cls.__name__ if cls in _KINDS else f"{cls.__module__}.{cls.__name__}"


def _inside(layers: Collection[str], model: nn.Module) -> str:
    """The submodule that has all the layers, when there is one: a ``target`` was quantized."""
    names = {name for name, _ in model.named_modules()}
    fits = [name for name in names if name and all(f"{name}.{layer}" in names for layer in layers)]
    return f", e.g. its submodule {min(fits, key=len)!r}" if fits else ""


def _fill(model: nn.Module, data: dict[str, Any]) -> None:
    """Put the float tensors in place, with their dtypes, and give each layer the dtype to compute in."""
    modules: dict[str, Any] = dict(model.named_modules())
    parameters: dict[int, nn.Parameter] = {}
    caches = _float_tensors(model, data["layers"])[1]  # one that the first call makes is not there yet
    kept = {name: tensor for name, tensor in data["caches"].items() if name in caches}
    for name, tensor in {**data["tensors"], **kept}.items():
        prefix, _, key = name.rpartition(".")
        if key in modules[prefix]._parameters:
            parameter = parameters.setdefault(id(tensor), nn.Parameter(tensor, requires_grad=False))
            modules[prefix]._parameters[key] = parameter
        else:
            modules[prefix]._buffers[key] = tensor
    for name, layer in data["layers"].items():
        weight = modules[name].weight.detach().to(getattr(torch, layer["dtype"]))
        modules[name].weight = nn.Parameter(weight, requires_grad=False)
