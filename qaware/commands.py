"""What each command does; what it needs is imported by it, so that the others start at once."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jsonargparse import Namespace


def run(options: Namespace) -> int:
    """Run an experiment, print its table."""
    from qaware.config import load_config
    from qaware.experiment import read_experiment
    from qaware.report.table import print_table
    from qaware.run import Run

    run = Run(read_experiment(load_config(options.config, options.trust or [])))
    try:
        with _quiet_trainers():
            run.execute()
    finally:
        if run.ledger.rows:
            print_table(run.ledger.rows, run.experiment.name)
            print(f"report: {run.folder / 'report.md'}")
    return 0


@contextmanager
def _quiet_trainers() -> Iterator[None]:
    """An experiment makes several Trainers; each would say again which accelerators there are. What qaware
    says, e.g. which engine it chose, stays."""
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")

    def keep(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.WARNING or record.getMessage().startswith("qaware:")

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def check(options: Namespace) -> int:
    """Print the fate of every parameter."""
    from qaware.config import load_config
    from qaware.experiment import build_model, check_plans, read_experiment
    from qaware.hardware import hardware_notes

    experiment = read_experiment(load_config(options.config, options.trust or []))
    for plan in check_plans(experiment, build_model(experiment)):
        print(plan.summary())
        for note in hardware_notes(plan):
            print(f"  {note}")
        for decision in plan.decisions:
            scheme = decision.scheme.label if decision.scheme else "float"
            tie = f"; tied to {decision.tied_to}" if decision.tied_to else ""
            print(f"  {decision.parameter:<58} {scheme:<28} {decision.reason}{tie}")
    return 0


def sensitivity(options: Namespace) -> int:
    """Rank layers, print the table."""
    from qaware.config import load_config
    from qaware.experiment import read_experiment
    from qaware.mixed.run import SensitivityRun
    from qaware.report.sensitivity import print_sensitivity

    experiment = read_experiment(load_config(options.config, options.trust or []))
    run = SensitivityRun(
        experiment, options.recipe, options.method, options.windows, options.out, options.checkpoint
    )
    with _quiet_trainers():
        run.execute()
    print_sensitivity(run.result, f"{experiment.name}: {run.result.recipe}")
    print(f"table and plot: {run.out}")
    return 0


def search(options: Namespace) -> int:
    """Find a recipe, export and score it."""
    from qaware.config import load_config
    from qaware.experiment import read_experiment
    from qaware.mixed.budget import Budget
    from qaware.mixed.choices import parse_widths
    from qaware.mixed.run import SearchRun
    from qaware.mixed.search import Settings
    from qaware.report.search import search_lines
    from qaware.report.table import print_table

    settings = Settings(Budget.parse(options.budget), parse_widths(options.bits), method=options.method)
    seed = [] if options.seed is None else [f"seed={options.seed}"]
    experiment = read_experiment(load_config([*options.config, *seed], options.trust or []))
    measured = options.windows, options.out, options.checkpoint
    run = SearchRun(experiment, settings, options.base, *measured, train=options.train)
    with _quiet_trainers():
        run.execute()
    print_table(run.ledger.rows, experiment.name)
    print("\n".join(search_lines(run.found)))
    print(f"recipe: {run.path}\nreport: {run.folder / 'report.md'}")
    return 0


def report(options: Namespace) -> int:
    """Rebuild a run's report."""
    from qaware.report.ledger import read_rows
    from qaware.report.table import print_table
    from qaware.report.write import RESULTS, write_report

    folder = Path(options.folder)
    if not (folder / RESULTS).exists():
        runs = sorted(folder.glob(f"*/{RESULTS}"))
        folder = runs[-1].parent if runs else folder
    report = write_report(folder)
    print_table(read_rows(folder / RESULTS), folder.parent.name)
    print(f"report: {report}")
    return 0


def evaluate(options: Namespace) -> int:
    """Score an artifact."""
    from qaware.evaluation import evaluate_artifact
    from qaware.report.table import print_table

    row = evaluate_artifact(Path(options.artifact), options.data, options.window, options.max_windows)
    print_table([row])
    return 0


def generate(options: Namespace) -> int:
    """Continue a prompt; text to standard output, speed to standard error."""
    from qaware import generating

    unsaid = iter([options.prompt])  # said with the first new text, after all that may be wrong
    found = generating.generate(
        options.artifact,
        options.prompt,
        options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        seed=options.seed,
        on_text=lambda piece: print(next(unsaid, ""), piece, sep="", end="", flush=True),
    )
    print(next(unsaid, ""))
    print(found.summary, file=sys.stderr)
    return 0


def recipes(options: Namespace) -> int:
    """List the named recipes, or print one, or ask every runtime about one or all."""
    if options.matrix:
        from qaware.matrix import markdown, support

        print(markdown(support(options.name and [options.name])))
        return 0
    from qaware.recipe import Recipe
    from qaware.recipe_plugins import packaged_names
    from qaware.shipped import preset_names, recipe_names

    if options.name is None:
        for name in (*recipe_names(), *preset_names()):
            print(f"{name:<32} {Recipe.load(name).description.strip()}")
        for name in packaged_names():
            print(f"{name:<32} {_description(name)}")
        return 0
    import yaml

    print(yaml.safe_dump(Recipe.load(options.name).to_dict(), sort_keys=False), end="")
    return 0


def _description(name: str) -> str:
    """Of another package's recipe; a broken one does not hide the others."""
    from qaware.errors import QawareError
    from qaware.recipe import Recipe

    try:
        return Recipe.load(name).description.strip()
    except QawareError as error:
        return str(error)


def overlay(options: Namespace) -> int:
    """List the overlays, or print one."""
    from qaware.overlays import describe_overlay, overlay_names, read_overlay

    if options.name is not None:
        print(read_overlay(options.name), end="")
        return 0
    for name in overlay_names():
        print(f"{name:<16} {describe_overlay(name)}")
    return 0


COMMANDS: dict[str, Callable[[Any], int]] = {
    "run": run,
    "check": check,
    "sensitivity": sensitivity,
    "search": search,
    "report": report,
    "evaluate": evaluate,
    "generate": generate,
    "recipes": recipes,
    "overlay": overlay,
}
