"""Which recipe runs on which runtime: as integers, by dequantizing, or not at all.

The exporters themselves are asked, about two small reference networks, so the table cannot say what
:mod:`qaware.exporters.check` would not. ``python -m benchmarks.matrix`` runs every cell that claims to run.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qaware.engines.choose import lay_out
from qaware.engines.example import Example
from qaware.errors import QawareError
from qaware.exporters import exporter_names, get_exporter
from qaware.exporters.base import Exporter
from qaware.exporters.check import check
from qaware.lm import CausalLM
from qaware.matching import CONVOLUTIONS
from qaware.plan import Plan
from qaware.recipe import Recipe
from qaware.shipped import preset_names, recipe_names
from qaware.vision.networks import CifarResNet

FAST, DEQUANTIZES, REFUSED = "integers", "float", "no"
"""The runtime multiplies the stored integers; it multiplies floats made of them; it cannot hold them."""
LANGUAGE, VISION = "language", "vision"
TOKENS, VOCABULARY = 32, 256
_LLAMA = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 2 * TOKENS,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Line:
    """One row of the table."""

    recipe: str
    engine: str
    """``modules``, ``eager`` or ``graph``."""
    network: str
    """``language``, a Llama of three blocks, or ``vision``, a ResNet."""


@dataclass(frozen=True)
class Cell:
    """A row on one runtime."""

    line: Line
    runtime: str
    state: str
    """``integers``, ``float`` or ``no``."""
    why: tuple[str, ...] = ()
    """Of layers that are multiplied in float, or cannot be held."""


def reference(network: str) -> nn.Module:
    """The model that a row is about, in evaluation mode."""
    torch.manual_seed(0)
    model: nn.Module = CausalLM(_LLAMA) if network == LANGUAGE else CifarResNet(8)
    return model.eval()


def batch(network: str, seed: int = 0) -> Tensor:
    """int64 tokens (1, TOKENS), or float32 images (4, 3, 32, 32)."""
    random = torch.Generator().manual_seed(seed)
    if network == LANGUAGE:
        return torch.randint(0, VOCABULARY, (1, TOKENS), generator=random)
    return torch.randn(4, 3, 32, 32, generator=random)


def support(recipes: Sequence[str] | None = None, runtimes: Sequence[str] | None = None) -> list[Cell]:
    """Every cell, row by row; nothing is quantized or exported, and no runtime needs to be installed.

    Args:
        recipes: names; default all that come with qaware.
        runtimes: names; default all, those of other packages too.

    Raises:
        QawareError: unknown recipe or runtime, or a recipe for layers that the reference networks have not.
    """
    exporters = [get_exporter(name) for name in runtimes or exporter_names()]
    found = []
    for name in recipes or (*recipe_names(), *preset_names()):
        rows = lines(Recipe.load(name), name)
        if not rows:
            raise QawareError(
                f"recipe: {name!r} quantizes nothing in the reference networks, a Llama and a ResNet; ask "
                "qaware check about your model"
            )
        found += [_cell(line, exporter) for line in rows for exporter in exporters]
    return found


def lines(recipe: Recipe, name: str) -> list[Line]:
    """The rows of a recipe: language models where activations are not static, and networks of convolutions
    where it quantizes those, by each engine that may prepare it."""
    plans = {network: recipe.match(reference(network)) for network in (LANGUAGE, VISION)}
    static = plans[VISION].needs_calibration
    found = [Line(name, "modules", LANGUAGE)] if plans[LANGUAGE].quantized and not static else []
    if any(d.type in CONVOLUTIONS for d in plans[VISION].quantized.values()):
        found += [Line(name, engine, VISION) for engine in ("eager", "graph") if static or engine == "eager"]
    return found


def _cell(line: Line, exporter: Exporter) -> Cell:
    model = reference(line.network)
    plan = Recipe.load(line.recipe).match(model)
    refusal = _refusal(plan, exporter)
    if not refusal:
        try:
            plan, _ = lay_out(plan, model, lambda: _example(line), [exporter.name], line.engine)
            refusal = _refusal(plan, exporter)
        except QawareError as error:
            refusal = (str(error),)
    if refusal:
        return Cell(line, exporter.name, REFUSED, refusal)
    unpacked = tuple(dict.fromkeys(_unpacked(plan, exporter)))
    return Cell(line, exporter.name, DEQUANTIZES if unpacked else FAST, unpacked)


def _refusal(plan: Plan, exporter: Exporter) -> tuple[str, ...]:
    """The first reason, or none."""
    missing = exporter.missing()  # of this machine, and no matter of what the runtime holds
    problems = (problem.message for problem in check(plan, [exporter]) if problem.message != missing)
    return tuple(problem.removeprefix(f"{exporter.name}: ") for problem in itertools.islice(problems, 1))


def _unpacked(plan: Plan, exporter: Exporter) -> Iterable[str]:
    return (why for decision in plan.quantized.values() if (why := exporter.unpacks(decision)))


def _example(line: Line) -> Example:
    return Example((batch(line.network),), {})


def markdown(cells: Sequence[Cell]) -> str:
    """The table, and below it each reason with the rows that it is for."""
    runtimes = list(dict.fromkeys(cell.runtime for cell in cells))
    by_line: dict[Line, dict[str, Cell]] = {}
    for cell in cells:
        by_line.setdefault(cell.line, {})[cell.runtime] = cell
    rows = [["recipe", "engine", *runtimes]]
    for line, found in by_line.items():
        rows.append([f"`{line.recipe}`", line.engine, *(found[runtime].state for runtime in runtimes)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    rows.insert(1, ["-" * width for width in widths])
    padded = [[text.ljust(width) for text, width in zip(row, widths, strict=True)] for row in rows]
    table = "\n".join(f"| {' | '.join(row)} |" for row in padded)
    return "\n\n".join([table, *_reasons(cells, runtimes)])


def _reasons(cells: Sequence[Cell], runtimes: Sequence[str]) -> list[str]:
    texts = []
    for runtime in runtimes:
        found: dict[tuple[str, str], list[str]] = {}
        for cell in cells:
            for why in cell.why if cell.runtime == runtime else ():
                found.setdefault((cell.state, why), []).append(_named(cell.line))
        items = [
            f"- {state}: {why} ({', '.join(dict.fromkeys(names))})" for (state, why), names in found.items()
        ]
        if items:
            texts.append("\n".join([f"**{runtime}**", "", *items]))
    return texts


def _named(line: Line) -> str:
    return line.recipe if line.engine != "graph" else f"{line.recipe} by graph"
