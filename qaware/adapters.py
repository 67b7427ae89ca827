"""What the adapters of ``peft`` leave of a model once they are merged.

Rules name layers as they are called without adapters, so one recipe fits a model with and without them.
peft is imported only where a module is one of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qaware.sharded import plain_class

if TYPE_CHECKING:
    from torch import nn

ADAPTER = "adapter, merged at convert"
_WAY_OUT = "adapt it with plain LoRA, or keep it float by a rule for its name with scheme: null"


@dataclass(frozen=True)
class Place:
    """What becomes of one module at convert."""

    name: str
    """Its name once adapters are merged."""
    dropped: str | None = None
    """Why it is gone then; None where it stays."""
    merged: bool = False
    """Whether an adapter is added to its weight."""
    obstacle: str | None = None
    """Why its weight cannot be quantized under its adapter, with the way out."""


def from_peft(module: nn.Module) -> bool:
    """Whether the class of ``module``, or one that it derives from, is peft's."""
    return any(cls.__module__.partition(".")[0] == "peft" for cls in type(module).__mro__)


def successor(module: Any) -> nn.Module | None:
    """What takes the place of one of peft's modules at convert; None for any other module, which stays."""
    if not from_peft(module):
        return None
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

    found: nn.Module | None
    if isinstance(module, BaseTuner):
        found = module.model
    elif isinstance(module, BaseTunerLayer):
        found = module.base_layer
    elif "token_adapter" in module._modules:
        found = module.token_adapter
    elif "original_module" in module._modules:
        found = _trained_copy(module) or module.original_module
    else:  # a PeftModel; its prompts, if it learns prompts, are no part of a weight and stay
        inner = getattr(module, "base_model", None)
        found = inner if isinstance(inner, BaseTuner) else None
    return found


def _trained_copy(wrapper: Any) -> nn.Module | None:
    """The copy that ``modules_to_save`` trains instead of the original module, while it is in use."""
    copies = wrapper._modules.get("modules_to_save", {})
    active = [] if wrapper.disable_adapters else wrapper.active_adapters
    return next((copies[name] for name in active if name in copies), None)


def find_places(model: nn.Module) -> dict[str, Place]:
    """The place of every module, by its name; empty for a model without peft."""
    modules = dict(model.named_modules())
    if not any(from_peft(module) for module in modules.values()):
        return {}
    wrappers: dict[int, str] = {}
    places: dict[str, Place] = {}
    for name, module in modules.items():
        wrapper = wrappers.get(id(module))
        if wrapper is not None:
            places[name] = _inside(places[wrapper], modules[wrapper])
        elif name:
            parent, _, leaf = name.rpartition(".")
            places[name] = _below(places[parent], modules[parent], leaf)
        else:
            places[name] = Place("")
        inner = successor(module)
        if inner is not None:
            wrappers[id(inner)] = name
    return places


def _inside(above: Place, wrapper: Any) -> Place:
    """The place of the module that a wrapper's place falls to."""
    merged = above.merged or "base_layer" in wrapper._modules
    return Place(above.name, above.dropped, merged, above.obstacle or _obstacle(wrapper))


def _below(above: Place, parent: Any, leaf: str) -> Place:
    """The place of an ordinary child of ``parent``."""
    name = f"{above.name}.{leaf}" if above.name else leaf
    if successor(parent) is None:
        return Place(name, above.dropped)
    return Place(name, ADAPTER if "base_layer" in parent._modules else "not in use, dropped at convert")


def _obstacle(wrapper: Any) -> str | None:
    """Why the module inside ``wrapper`` cannot be quantized; None where nothing speaks against it."""
    from peft.tuners import lora

    cls = plain_class(wrapper)
    if "base_layer" not in wrapper._modules or hasattr(wrapper.base_layer, "weight_fake_quantizer"):
        return None  # no adapter, or prepared before
    if cls is not lora.Linear or from_peft(wrapper.base_layer):
        return (
            f"its adapter is a {cls.__module__}.{cls.__name__}; only peft.tuners.lora.Linear over "
            f"one float torch.nn.Linear trains inside the rounding; {_WAY_OUT}"
        )
    return _lora_obstacle(wrapper)


def _lora_obstacle(layer: Any) -> str | None:
    if layer.merged:
        return f"adapters {layer.merged_adapters} are merged into its weight; call unmerge_adapter() first"
    if layer.lora_variant:
        kinds = ", ".join(sorted(type(v).__name__ for v in layer.lora_variant.values()))
        return f"its adapter is a {kinds}, which adds more than a product of matrices; {_WAY_OUT}"
    if any(layer.lora_bias.values()):
        return "its adapter has a bias; set lora_bias=False"
    return None
