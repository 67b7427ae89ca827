"""Metrics of Hugging Face `evaluate`: ours, a local script's, or the hub's."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real
from pathlib import Path
from typing import Any

from qaware.errors import QawareError

OWN = ("kl_divergence", "perplexity", "top1_agreement")
"""Metrics that this package ships as `evaluate` scripts. They take losses or logits, not classes."""

SCRIPTS = Path(__file__).parent / "evaluate"
"""The folder of our scripts: ``evaluate.load(str(SCRIPTS / "perplexity"))`` works without qaware's help."""


def load_metric(name: str) -> Any:
    """The `evaluate.EvaluationModule` called ``name``, keeping its data in memory.

    name: one of `OWN`; else the path of a metric's script or folder; else a name on the Hugging Face hub,
        whose code `evaluate` then downloads into the HF_HOME cache and runs.

    Raises QawareError when it cannot be loaded, e.g. offline.
    """
    target = _locate(name)
    try:
        with _quiet():
            import evaluate

            return evaluate.load(target, keep_in_memory=True)
    except Exception as error:  # whatever a foreign script, the network or the cache may raise
        raise QawareError(
            f"metric {name!r}: cannot be loaded ({_brief(error)}); check the name and the connection, "
            f"or give the path of a local `evaluate` script (built in: {', '.join(OWN)})"
        ) from error


def _locate(name: str) -> str:
    """The absolute path of a script, or ``name`` itself where that can only be on the hub."""
    path = SCRIPTS / name if name in OWN else Path(name).expanduser()
    script = path if path.suffix == ".py" else path / f"{path.name}.py"
    if script.is_file():
        return str(script.absolute())
    if path.is_absolute() or path.suffix == ".py" or name.startswith("."):
        raise QawareError(f"metric {name!r}: there is no {script}; give the path of an `evaluate` script")
    return name


def load_extra(names: Sequence[str]) -> dict[str, Any]:
    """Metrics to compute on argmax predictions, by name. Raises QawareError for ours and for unknown ones."""
    for name in names:
        if name in OWN:
            raise QawareError(f"extra: {name!r} is measured already, as a field of Score; leave it out")
    return {name: load_metric(name) for name in names}


def compute_extra(
    metrics: Mapping[str, Any], predictions: Sequence[int], references: Sequence[int]
) -> dict[str, float]:
    """Every number that the metrics return; keys are ``accuracy``, or ``glue.f1`` where names differ.

    Raises QawareError when a metric fails on two lists of ints or returns no number.
    """
    values: dict[str, float] = {}
    for name, metric in metrics.items():
        try:
            result = metric.compute(predictions=list(predictions), references=list(references))
        except Exception as error:  # foreign code
            raise QawareError(
                f"extra: {name!r} failed on integer predictions and references ({_brief(error)}); "
                "use a metric for classes, such as accuracy"
            ) from error
        values |= _numbers(Path(name).stem, result)
    return values


def _numbers(name: str, result: Any) -> dict[str, float]:
    items = result.items() if isinstance(result, Mapping) else ()
    found = {key: float(value) for key, value in items if isinstance(value, Real)}
    if not found:
        raise QawareError(
            f"extra: {name!r} returned no number but {result!r}; use a metric that returns numbers"
        )
    return {key if key == name else f"{name}.{key}": value for key, value in found.items()}


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence warnings and log lines below critical.

    Importing `evaluate` imports transformers and torchao, which report optional parts that are missing.
    """
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _brief(error: BaseException) -> str:
    text = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {text[0][:200]}"
