"""Build contenders, open each in a process of its own, check what they compute, and let them take turns."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.contender import LM, MODELS, Contender, runtime
from benchmarks.inputs import PREFILL, SIZES, Array, images, tokens
from benchmarks.speed_rows import Key, Measured, Results
from benchmarks.timing import Block, interleaved
from benchmarks.workers import Child, WorkerError

ROUNDS, SECONDS = 9, 0.12
UNTIMED = ("int4-embedding8",)
"""Variants of which only the bytes count."""


def build(keys: Iterable[Key], size: str, work: Path) -> Results:
    """Every contender's file, or why there is none; those that ``work`` already has are not made again."""
    results, wanted = Results(), sorted(set(keys))
    for name in dict.fromkeys(key[0] for key in wanted):
        mine = [key for key in wanted if key[0] == name]
        if why := runtime(name).missing():
            results.skipped.update(dict.fromkeys(mine, f"skipped: {why}"))
            print(f"{name}: skipped: {why}", flush=True)
        else:
            _build(mine, size, work / size, results)
    return results


def _build(keys: Sequence[Key], size: str, work: Path, results: Results) -> None:
    """All of one runtime in one process, and in a new one after one that ended."""
    with contextlib.ExitStack() as stack:
        child: Child | None = None
        for key in keys:
            record = work / key[0] / f"{key[1]}-{key[2]}.contender.json"
            if not record.is_file():
                if child is None or child.ended:
                    child = stack.enter_context(Child(work / f"{key[0]}.log", 1))
                _make(child, key, size, record, results)
            if record.is_file():
                made = Contender(**json.loads(record.read_text(encoding="utf-8")))
                results.measured[key] = Measured(made)


def _make(child: Child, key: Key, size: str, record: Path, results: Results) -> None:
    name, model, variant = key
    record.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    try:
        made = child.ask(
            "build", name=name, model=model, variant=variant, size=size, folder=str(record.parent)
        )
    except WorkerError as error:
        results.skipped[key] = f"failed: {error}"
        print(f"{name} {model} {variant}: could not be built: {error}", flush=True)
        return
    record.write_text(json.dumps(made), encoding="utf-8")
    print(
        f"  built {name} {model} {variant}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True
    )


def measure(results: Results, size: str, threads: Sequence[int], work: Path) -> None:
    """Time all contenders of a model against each other, once for each number of threads."""
    for model in MODELS:
        expected = _expected(model, size) if any(key[1] == model for key in results.measured) else {}
        for count in threads:
            keys = [k for k in results.measured if k[1] == model and k[2] not in UNTIMED]
            with contextlib.ExitStack() as stack:
                children = dict(_opened(keys, results, size, count, work, expected, stack))
                for call in MODELS[model]:
                    blocks = {
                        json.dumps(k): _block(child, _told(results, k, call)) for k, child in children.items()
                    }
                    for key, timing in interleaved(blocks, ROUNDS, SECONDS).items():
                        results.measured[tuple(json.loads(key))].timings[call, count] = timing


def _opened(
    keys: Sequence[Key],
    results: Results,
    size: str,
    threads: int,
    work: Path,
    expected: dict[str, Array],
    stack: contextlib.ExitStack,
) -> Iterator[tuple[Key, Child]]:
    """A process for each key; one that cannot open its file leaves the results."""
    for key in keys:
        measured = results.measured[key]
        child = stack.enter_context(Child(work / size / f"{key[0]}.log", threads))
        try:
            told = child.ask("open", contender=measured.contender.to_dict(), size=size, threads=threads)
            measured.cached = "alone" not in told["calls"]
            if measured.load_s is None:
                measured.load_s, measured.peak_mb = told["load_s"], told["peak_mb"]
                measured.distance = _distances(child, results, key, expected, work)
        except WorkerError as error:
            del results.measured[key]
            results.skipped[key] = f"failed: {error}"
            print(f"{' '.join(key)}: {error}", flush=True)
            continue
        yield key, child


def _told(results: Results, key: Key, call: str) -> str:
    return "alone" if call == "decode" and not results.measured[key].cached else call


def _block(child: Child, call: str) -> Block:
    def run(count: int) -> tuple[float, float]:
        reply = child.ask("time", what=call, count=count)
        return reply["wall"], reply["cpu"]

    return run


def _distances(
    child: Child, results: Results, key: Key, expected: dict[str, Array], work: Path
) -> dict[str, float]:
    """How far each call's logits are from the float model's; a wrong position or weight is off by 1."""
    found = {}
    for call in MODELS[key[1]]:
        told, path = _told(results, key, call), work / "logits.npy"
        child.ask("save", what=told, path=str(path))
        given, right = np.load(path), expected[told]
        found[call] = float(np.abs(given.reshape(right.shape) - right).mean() / right.std())
    return found


def _expected(model: str, size: str) -> dict[str, Array]:
    """The float model's logits, by call."""
    import torch

    from benchmarks.speed_models import convolutions, language_model

    chosen: Any = SIZES[size]
    with torch.no_grad():
        if model != LM:
            return {"image": convolutions(chosen)(torch.from_numpy(images(1, chosen.image))).numpy()}
        network, ids = language_model(chosen), torch.from_numpy(tokens(chosen.vocabulary))
        logits, alone = network(ids).numpy(), network(ids[:, PREFILL:]).numpy()
    return {"prefill": logits[:, :PREFILL], "decode": logits[:, PREFILL:], "alone": alone}
