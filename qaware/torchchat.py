"""torchchat's quantization JSON as a recipe.

The keys, their options and defaults are those of torchchat's ``docs/quantization.md`` and
``torchchat/utils/quantize.py`` (release of 2025) and, for the low-bit ones, of the quantizers of torchao that
these call. What is ours: scales of up to 4 bits are rounded to bfloat16, which XNNPACK stores and tract's
Q4_0 holds exactly; a zero point is an integer; a group that does not divide a row is refused, not padded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qaware.errors import QawareError
from qaware.recipe import Recipe, Rule, _suggest
from qaware.scheme import FLOAT16_BITS, Scheme

_LOW_BITS = tuple(range(1, 8))
_POWERS = (32, 64, 128, 256)
_PACKED_SCALES = 4
"""Bits up to which scales are bfloat16."""


@dataclass(frozen=True)
class Quantizer:
    """What one key of the JSON means, and which values its options may have."""

    layer: str
    """Class name of the modules that it is for."""
    bits: tuple[int, ...]
    """What ``bitwidth`` may be, its default first; one value: there is no such option."""
    group: int
    """``groupsize`` where it is left out."""
    groups: tuple[int, ...] | None
    """What ``groupsize`` may be; None: 0, for one scale per channel, or 2 and more."""
    activation: str = "none"
    zeros: bool | None = False
    """Whether weights have zero points; None: as ``has_weight_zeros`` says, false where it is left out."""

    @property
    def options(self) -> tuple[str, ...]:
        """Names of its options."""
        bits = ("bitwidth",) if len(self.bits) > 1 else ()
        return (*bits, "groupsize", *(("has_weight_zeros",) if self.zeros is None else ()))

    def scheme(self, key: str, options: Mapping[str, Any]) -> Scheme:
        """The scheme of ``key`` with ``options``.

        Raises:
            QawareError: an option or value that torchchat's tables have not.
        """
        for name in options:
            if name not in self.options:
                raise QawareError(
                    f"torchchat: {key}: unknown key {name!r}{_suggest(str(name), self.options)}"
                )
        bits = _whole(f"{key}.bitwidth", options.get("bitwidth", self.bits[0]), tuple(sorted(self.bits)))
        group = _whole(f"{key}.groupsize", options.get("groupsize", self.group), self.groups)
        zeros = options.get("has_weight_zeros", False) if self.zeros is None else self.zeros
        if not isinstance(zeros, bool):
            raise QawareError(f"torchchat: {key}.has_weight_zeros: {zeros!r} must be true or false")
        precision = "bfloat16" if bits <= _PACKED_SCALES else "float32"
        return Scheme(bits, group, self.activation, symmetric=not zeros, scale_dtype=precision)


QUANTIZERS = {
    "embedding": Quantizer("Embedding", (8, 4), 0, None),
    "embedding:wx": Quantizer("Embedding", (4, *_LOW_BITS), 128, None, zeros=True),
    "linear:int8": Quantizer("Linear", (8, 4), 0, None),
    "linear:int4": Quantizer("Linear", (4,), 256, (0, *_POWERS), zeros=True),
    "linear:a8w4dq": Quantizer("Linear", (4,), 256, None, "int8-dynamic"),
    "linear:a8wxdq": Quantizer("Linear", (4, *_LOW_BITS), 128, None, "int8-dynamic", zeros=None),
    "linear:afpwx": Quantizer("Linear", (4, *_LOW_BITS), 128, _POWERS, zeros=True),
}
ACCELERATORS = ("cpu", "cuda", "mps", "xpu", "npu", "fast")
_FLOAT32 = ("fp32", "float", "float32")
_HALF = ("fp16", "half", "float16", "bf16", "bfloat16", "fast", "fast16")
"""``fast`` and ``fast16`` are bfloat16 or float16 there, as the CPU likes."""
_SETTINGS = {"executor": ("accelerator", ACCELERATORS), "precision": ("dtype", (*_FLOAT32, *_HALF))}
KEYS = (*QUANTIZERS, *_SETTINGS)


def is_torchchat(data: object) -> bool:
    """Whether ``data`` is meant as torchchat's: a key begins as its keys do."""
    if not isinstance(data, Mapping) or "rules" in data or "roles" in data:
        return False
    return any(str(key).startswith(("linear", "embedding", *_SETTINGS)) for key in data)


def read_recipe(data: Mapping[str, Any], name: str | None = None) -> Recipe:
    """The recipe that ``data`` stands for.

    Args:
        data: parsed JSON, e.g. ``{"embedding": {"bitwidth": 4, "groupsize": 32}}``.
        name: of the recipe; None for one that is made of what it says.

    Raises:
        QawareError: an unknown key or option, a bit width or group size that torchchat's tables have not,
            or two keys for the same layers.
    """
    rules: dict[str, Rule] = {}
    said: list[str] = []
    settings: dict[str, str] = {}
    for key, options in data.items():
        if key not in KEYS:
            raise QawareError(f"torchchat: unknown key {key!r}{_suggest(str(key), KEYS)}")
        if not isinstance(options, Mapping):
            raise QawareError(f"torchchat: {key}: {options!r} must be a mapping of options, e.g. {{}}")
        if key in _SETTINGS:
            settings[key] = _setting(key, options)
            continue
        quantizer = QUANTIZERS[key]
        if quantizer.layer in rules:
            taken = next(k for k in data if k in QUANTIZERS and QUANTIZERS[k].layer == quantizer.layer)
            raise QawareError(f"torchchat: {key}: {quantizer.layer} layers have {taken!r} already; keep one")
        scheme = quantizer.scheme(key, options)
        rules[quantizer.layer] = Rule(scheme, type=quantizer.layer)
        said.append(_label(key, scheme))
    return _recipe(name, list(rules.values()), said, settings)


def _recipe(name: str | None, rules: list[Rule], said: list[str], settings: Mapping[str, str]) -> Recipe:
    """The rules, after them those of what stays 16 bits, and what was said in words."""
    if settings.get("precision") in _HALF:
        rules += [Rule(Scheme(FLOAT16_BITS), type=layer) for layer in ("Embedding", "Linear")]
        said.append(settings["precision"])
    if not rules:
        raise QawareError(
            f"torchchat: {' and '.join(settings)} alone: nothing would be quantized; add one of "
            f"{', '.join(QUANTIZERS)}"
        )
    return Recipe(name or "+".join(said), tuple(rules), description=_describe(settings))


def _describe(settings: Mapping[str, str]) -> str:
    sentences = ["From torchchat's quantization JSON."]
    if dtype := settings.get("precision"):
        kept = "float16 and compute in float32" if dtype in _HALF else "float32"
        sentences.append(f"precision.dtype {dtype}: weights that no other key is for are kept in {kept}.")
    if accelerator := settings.get("executor"):
        sentences.append(
            f"executor.accelerator {accelerator}: what it was made for; export says where it runs."
        )
    return " ".join(sentences)


def _label(key: str, scheme: Scheme) -> str:
    """``linear.a8w4dq-4-g256`` for names of recipes and files."""
    unit = f"g{scheme.group_size}" if scheme.group_size else "channel"
    zeros = "" if scheme.symmetric else "-zeros"
    return f"{key.replace(':', '.')}-{scheme.bits}-{unit}{zeros}"


def _setting(key: str, options: Mapping[str, Any]) -> str:
    option, legal = _SETTINGS[key]
    for name in options:
        if name != option:
            raise QawareError(f"torchchat: {key}: unknown key {name!r}; known: {option}")
    value = options.get(option)
    if value not in legal:
        raise QawareError(f"torchchat: {key}.{option}: {value!r} is not one of {', '.join(legal)}")
    return str(value)


def _whole(option: str, value: Any, legal: tuple[int, ...] | None) -> int:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if legal is not None:
        if not (whole and value in legal):
            several = ", ".join(map(str, dict.fromkeys(legal)))
            raise QawareError(f"torchchat: {option}: {value!r} is not one of {several}")
    elif not whole or value < 0 or value == 1:
        raise QawareError(f"torchchat: {option}: {value!r} must be 0 (one scale per channel), 2 or more")
    return int(value)
