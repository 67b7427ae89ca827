"""A recipe: ordered rules that say which modules get which scheme, and how integers are chosen."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qaware.errors import QawareError
from qaware.reading import parse_json, read_json, read_yaml
from qaware.recipe_plugins import packaged_names, read_packaged
from qaware.role_rules import rules_of
from qaware.roles import ROLES
from qaware.roundings import Step, parse_steps
from qaware.scheme import Scheme
from qaware.shipped import preset_names, read_shipped, recipe_names

if TYPE_CHECKING:
    from torch import nn

    from qaware.plan import Plan


LEARNING = ("none", "lsq", "range")


@dataclass(frozen=True)
class Rule:
    """Which modules a scheme is for. Every condition that is given must hold; the first rule wins."""

    scheme: Scheme | None = None
    """The scheme, or None (``null``, or left out) for modules that stay float."""
    role: str | None = None
    """``embedding``, ``attention``, ``feedforward`` or ``head``."""
    type: str | None = None
    """Class name of the module, e.g. ``Linear``."""
    name: str | None = None
    """Shell-style pattern of the module's name, e.g. ``*.down_proj``."""
    blocks: tuple[int, ...] | None = None
    """Numbers of blocks, e.g. ``layers.0`` or ``h.11``: those of the first number in a module's name, counted
    from the end where they are negative, so ``[0, -1]`` are the first and the last block."""

    def __post_init__(self) -> None:
        if self.role is not None and self.role not in ROLES:
            raise QawareError(f"role: {self.role!r} is not one of {', '.join(ROLES)}")
        if (self.role, self.type, self.name, self.blocks) == (None,) * 4:
            raise QawareError(
                "rule: give at least one of role, type, name, blocks (name: '*' means every module)"
            )
        self._check_blocks()
        for key in ("type", "name"):
            if not isinstance(getattr(self, key), (str, type(None))):
                raise QawareError(f"{key}: {getattr(self, key)!r} must be text")

    def _check_blocks(self) -> None:
        if self.blocks is None:
            return
        blocks = self.blocks if isinstance(self.blocks, (list, tuple)) else ()
        if not blocks or any(type(block) is not int for block in blocks):
            raise QawareError(f"blocks: {self.blocks!r} must be a list of whole numbers, e.g. [0, -1]")
        object.__setattr__(self, "blocks", tuple(blocks))

    @property
    def label(self) -> str:
        """The conditions, e.g. ``role=embedding``."""
        given = {"role": self.role, "type": self.type, "name": self.name}
        if self.blocks is not None:
            given["blocks"] = ",".join(map(str, self.blocks))
        return " ".join(f"{k}={v}" for k, v in given.items() if v is not None)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Rule:
        """Build from parsed YAML; unknown keys are errors."""
        _refuse_unknown("rule", data, cls)
        scheme = data.get("scheme")
        if isinstance(scheme, Mapping):
            _refuse_unknown("scheme", scheme, Scheme)
            if "bits" not in scheme:
                raise QawareError(f"scheme: {dict(scheme)!r} has no bits; e.g. {{bits: 8}}")
            scheme = Scheme(**scheme)
        elif scheme is not None and not isinstance(scheme, Scheme):
            raise QawareError(
                f"scheme: {scheme!r} must be a mapping such as {{bits: 4, group_size: 32}} or null"
            )
        return cls(scheme=scheme, **{k: data[k] for k in ("role", "type", "name", "blocks") if k in data})

    def to_dict(self) -> dict[str, Any]:
        """Plain data that ``from_dict`` reads back."""
        given = {"role": self.role, "type": self.type, "name": self.name}
        rule: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
        if self.blocks is not None:
            rule["blocks"] = list(self.blocks)
        return {**rule, "scheme": None if self.scheme is None else self.scheme.to_dict()}


@dataclass(frozen=True)
class Recipe:
    """Named, ordered rules and the rounding method."""

    name: str
    rules: tuple[Rule, ...]
    rounding: Any = "rtn"
    """How PTQ chooses the integers: a step of :mod:`qaware.roundings`, e.g. ``gptq``, or a list of them, e.g.
    ``[smoothquant, {gptq: {damping: 0.05}}]``. QAT rounds to nearest as it trains."""
    description: str = ""
    learning: str = "none"
    """What QAT trains of a weight's grid: ``none``, the scale follows from the weight in each step; ``lsq``,
    its scale; or ``range``, its zero point too. See :mod:`qaware.engines.learned`. PTQ has no use for it."""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not re.fullmatch(r"\w[\w.+ -]*", self.name):
            raise QawareError(f"name: {self.name!r} must be letters, digits, '-', '_', '.' (it names files)")
        if not isinstance(self.description, str):
            raise QawareError(f"description: {self.description!r} must be text")
        if not self.rules:
            raise QawareError(f"rules: recipe {self.name!r} has none, so nothing would be quantized")
        if self.learning not in LEARNING:
            raise QawareError(f"learning: {self.learning!r} is not one of {', '.join(LEARNING)}")
        for step, scheme in itertools.product(self.steps, filter(None, (rule.scheme for rule in self.rules))):
            if why := step.refuse(scheme):
                raise QawareError(f"rounding: {why}")

    @property
    def steps(self) -> tuple[Step, ...]:
        """What ``rounding`` says, step by step; exactly one of them chooses the integers."""
        return parse_steps(self.rounding)

    @property
    def rounding_label(self) -> str:
        """The steps for tables and file names, e.g. ``awq+gptq damping=0.05``."""
        return "+".join(step.label for step in self.steps if step.name != "rtn") or "rtn"

    @property
    def rounds(self) -> bool:
        """Whether ``rounding`` is anything but round to nearest, which the fake-quantizers do themselves."""
        return any(step.name != "rtn" for step in self.steps)

    @property
    def needs_data(self) -> bool:
        """Whether ``rounding`` has a step that looks at calibration batches."""
        return any(step.needs_data for step in self.steps)

    @property
    def hash(self) -> str:
        """First 16 hex digits of the sha256 of what the recipe does (not of its name or description)."""
        does = {k: v for k, v in self.to_dict().items() if k in ("rules", "rounding", "learning")}
        # What a package's name stands for may change with its version.
        if sets := {s.levels: s.level_set for rule in self.rules if (s := rule.scheme) and s.level_set}:
            does["levels"] = sets
        return hashlib.sha256(json.dumps(does, sort_keys=True).encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """Plain data that ``from_dict`` reads back; goes into checkpoints and sidecars."""
        return {
            "name": self.name,
            "description": self.description,
            "rounding": self.rounding,
            **({} if self.learning == "none" else {"learning": self.learning}),
            "rules": [rule.to_dict() for rule in self.rules],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], name: str = "custom") -> Recipe:
        """Build from parsed YAML or JSON; unknown keys are errors that suggest the nearest key.

        ``roles``, see :mod:`qaware.role_rules`, stands for rules behind those of ``rules``.
        """
        if not isinstance(data, Mapping):
            raise QawareError(f"recipe: expected a mapping with 'rules', got {type(data).__name__}")
        _refuse_unknown("recipe", data, cls, "roles")
        rules = data.get("rules") or ()
        if isinstance(rules, str) or not isinstance(rules, Iterable):
            raise QawareError(f"rules: {rules!r} must be a list")
        if "roles" in data:
            rules = [*rules, *rules_of(data["roles"])]
        built = []
        for i, rule in enumerate(rules):
            if not isinstance(rule, (Rule, Mapping)):
                raise QawareError(
                    f"rules[{i}]: {rule!r} must be a mapping such as {{role: embedding, scheme: ...}}"
                )
            built.append(rule if isinstance(rule, Rule) else Rule.from_dict(rule))
        rest = {k: data[k] for k in ("rounding", "description", "learning") if k in data}
        return cls(name=data.get("name", name), rules=tuple(built), **rest)

    @classmethod
    def load(cls, source: str | Path | Mapping[str, Any] | Recipe) -> Recipe:
        """A recipe from its name, the path of a YAML or JSON file, parsed data, or itself.

        Parsed data may be torchchat's too, and text that begins with ``{`` is JSON of either kind; see
        :mod:`qaware.torchchat`.

        Raises:
            QawareError: unknown name (the nearest ones are suggested), unreadable file, unknown key.
        """
        if isinstance(source, Recipe):
            return source
        if isinstance(source, Mapping):
            return _from_data(source)
        if not isinstance(source, (str, Path)):
            raise QawareError(f"recipe: {source!r} must be a name, the path of a YAML file or a mapping")
        if isinstance(source, str) and source.lstrip().startswith("{"):
            return _from_data(parse_json(source, "recipe"))
        path = Path(source)
        if path.suffix in (".yaml", ".yml"):
            return _from_data(read_yaml(path), path.stem)
        if path.suffix == ".json":
            return _from_data(read_json(path), path.stem)
        if str(source) in (shipped := (*recipe_names(), *preset_names())):
            return cls.from_dict(read_shipped(str(source)), name=str(source))
        if (found := read_packaged(str(source))) is not None:
            return found if isinstance(found, Recipe) else _from_data(found, str(source))
        known = (*shipped, *packaged_names())
        raise QawareError(f"recipe: {source!r} is not known{_suggest(str(source), known)}")

    def prepend(self, *rules: Rule) -> Recipe:
        """The recipe with ``rules`` in front, where they win over the others."""
        return dataclasses.replace(self, name=f"{self.name}+", rules=(*rules, *self.rules))

    def match(self, model: nn.Module) -> Plan:
        """The fate of every parameter of ``model``; see :class:`qaware.plan.Plan`."""
        from qaware.matching import make_plan

        return make_plan(self, model)


def _from_data(data: Any, name: str | None = None) -> Recipe:
    """Of our own kind, or torchchat's."""
    from qaware import torchchat

    if torchchat.is_torchchat(data):
        return torchchat.read_recipe(data, name)
    return Recipe.from_dict(data, name or "custom")


def _refuse_unknown(what: str, data: Mapping[str, Any], cls: type, *more: str) -> None:
    known = [*(field.name for field in dataclasses.fields(cls)), *more]
    for key in data:
        if key not in known:
            raise QawareError(f"{what}: unknown key {key!r}{_suggest(str(key), known)}")


def _suggest(word: str, known: Iterable[str]) -> str:
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.4)
    return (f"; did you mean {near[0]!r}?" if near else ";") + f" known: {', '.join(known)}"
