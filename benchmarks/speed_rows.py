"""The targets of speed, and what was measured for each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.contender import CNN, LM, OURS, Contender, runtime
from benchmarks.inputs import PREFILL
from benchmarks.rows import Row
from benchmarks.timing import Ratio, Timing, speedup

Key = tuple[str, str, str]
"""Runtime, model, variant."""
CALLS = {"decode": "next token", "prefill": f"{PREFILL} tokens", "image": "one image"}
UNITS = {"decode": 1, "prefill": PREFILL, "image": 1}
QUANTIZED = ("int4", "int8")


@dataclass
class Measured:
    """One contender and everything that was measured of it."""

    contender: Contender
    timings: dict[tuple[str, int], Timing] = field(default_factory=dict)
    """By call and number of threads."""
    load_s: float | None = None
    peak_mb: float | None = None
    distance: dict[str, float] = field(default_factory=dict)
    """By call: mean absolute difference to the float model's logits over their standard deviation."""
    cached: bool = True
    """Whether the next token is computed with a key-value cache."""

    def detail(self) -> dict[str, Any]:
        """For the table: speed by threads (one: CPU time; more: wall time), file, load, memory."""
        speeds = {
            f"{CALLS[call]}, threads {threads} ({'1/s' if call == 'image' else 'tok/s'})": UNITS[call]
            / timing.seconds(_clock(threads))
            for (call, threads), timing in self.timings.items()
        }
        return {
            "model": self.contender.name,
            **speeds,
            "bytes": self.contender.bytes,
            "load_s": self.load_s,
            "peak_mb": self.peak_mb,
            **{f"off_float_{call}": value for call, value in self.distance.items()},
            "cache": None if self.cached else "none",
            "how": self.contender.note,
        }


@dataclass
class Results:
    """All contenders of a run, and why others are not there."""

    measured: dict[Key, Measured] = field(default_factory=dict)
    skipped: dict[Key, str] = field(default_factory=dict)

    def why_not(self, keys: Iterable[Key]) -> str | None:
        """Why one of ``keys`` cannot be compared; None when all are there."""
        for key in keys:
            if key not in self.measured:
                return f"{key[0]} {key[2]}: {self.skipped.get(key, 'skipped: was not asked for')}"
        return None


@dataclass(frozen=True)
class Target:
    """One line: how many times faster one contender is to be than another, or how much smaller."""

    group: str
    """What ``--rows`` chooses."""
    what: str
    ours: tuple[Key, ...]
    """The best of these counts."""
    against: Key
    call: str
    """``decode``, ``prefill``, ``image``, or ``bytes``."""
    reach: float
    """At least, of speed; at most, of bytes."""

    @property
    def keys(self) -> tuple[Key, ...]:
        """Every contender that must be measured."""
        return (*self.ours, self.against)

    @property
    def name(self) -> str:
        """In the table."""
        return f"{self.what}: {CALLS.get(self.call, 'file bytes')}"

    @property
    def to_reach(self) -> str:
        """In the table."""
        return f"at most {self.reach:g}" if self.call == "bytes" else f"at least {self.reach:g}x"


def row(target: Target, results: Results, threads: Iterable[int]) -> Row:
    """Compare, round by round; the target is held against CPU time on one thread where that was measured."""
    there = tuple(key for key in target.ours if key in results.measured)
    why = results.why_not([target.against, *(there or target.ours)])
    if why is not None:
        return Row(target.name, "", target.to_reach, why, None, target.group)
    base = results.measured[target.against]
    if target.call == "bytes":
        return _bytes(target, results.measured[there[0]], base)
    return _speed(target, [results.measured[key] for key in there], base, list(threads))


def _bytes(target: Target, ours: Measured, base: Measured) -> Row:
    share = ours.contender.bytes / base.contender.bytes
    value = f"{share:.4f} ({ours.contender.bytes:,} of {base.contender.bytes:,})"
    missed = "" if share <= target.reach else f"{share - target.reach:.4f} more"
    details = [{"model": m.contender.name, "bytes": m.contender.bytes} for m in (ours, base)]
    return Row(target.name, "", target.to_reach, value, not missed, target.group, missed, details)


def _speed(target: Target, ours: list[Measured], base: Measured, threads: list[int]) -> Row:
    first = min(threads)
    ratios = {m.contender.name: _ratios(target.call, m, base, threads) for m in ours}
    best = max(ours, key=lambda m: ratios[m.contender.name][_label(first, _clock(first))].median)
    found = ratios[best.contender.name]
    held = found[_label(first, _clock(first))]
    others = ", ".join(f"{label} {ratio}" for label, ratio in found.items() if ratio is not held)
    who = f"{best.contender.name} " if len(target.ours) > 1 else ""
    lacking = "" if best.cached else "; without a key-value cache"
    met = held.median >= target.reach
    return Row(
        row=target.name,
        published="",
        target=target.to_reach,
        value=f"{who}{held}" + (f"; {others}" if others else "") + lacking,
        met=met,
        case=f"against {base.contender.name}; medians and quartiles of the ratios of each round",
        missed_by="" if met else f"{target.reach - held.median:.2f}x",
        details=[
            {"model": name, **{label: ratio.median for label, ratio in of.items()}}
            for name, of in ratios.items()
        ],
    )


def _ratios(call: str, ours: Measured, base: Measured, threads: list[int]) -> dict[str, Ratio]:
    return {
        _label(count, clock): speedup(ours.timings[call, count], base.timings[call, count], clock)
        for count in threads
        for clock in (("cpu", "wall") if count == 1 else ("wall",))
    }


def _clock(threads: int) -> str:
    """CPU time says what one thread did however busy the machine is; of several it would be their sum."""
    return "cpu" if threads == 1 else "wall"


def _label(threads: int, clock: str) -> str:
    return f"{clock} time" if threads == 1 else f"{threads} threads"


def targets() -> list[Target]:
    """The table of the project, line by line."""
    return [*_own_floats(), *_peers(), *_images(), *_sizes()]


_OWN: Mapping[tuple[str, str], Mapping[str, float]] = {
    ("executorch", "int4"): {"decode": 5.0, "prefill": 1.8, "bytes": 0.15},
    ("executorch", "int8"): {"prefill": 2.2},
    ("aoti", "int4"): {"decode": 4.5, "prefill": 1.5},
    ("aoti", "int8"): {"decode": 3.3, "prefill": 3.3},
    ("tract", "int4"): {"decode": 1.75, "prefill": 1.0},
}


def _own_floats() -> list[Target]:
    return [
        Target(
            name, f"{name} {variant} against its own fp32", ((name, LM, variant),), (name, LM, "fp32"), *at
        )
        for (name, variant), reach in _OWN.items()
        for at in reach.items()
    ]


def _peers() -> list[Target]:
    ours = tuple((name, LM, v) for name in OURS for v in QUANTIZED if v in runtime(name).variants[LM])
    return [
        Target("peers", f"best of ours against {peer} int4", ours, (peer, LM, "int4"), call, reach)
        for call, reach in (("decode", 1.0), ("prefill", 1.5))
        for peer in ("llama.cpp", "onnxruntime", "openvino")
    ]


def _images() -> list[Target]:
    reach = {"executorch": 2.5, "aoti": 2.5, "tract": 1.3}
    return [
        Target("cnn", f"{name} int8 against its own fp32", ((name, CNN, "int8"),), (name, CNN, "fp32"), *at)
        for name, least in reach.items()
        for at in [("image", least)]
    ]


def _sizes() -> list[Target]:
    variants = {"executorch": "int4-embedding8", "aoti": "int4", "tract": "int4"}
    what = "{} int4 with an 8-bit embedding against its own fp32"
    return [
        Target("bytes", what.format(name), ((name, LM, variant),), (name, LM, "fp32"), "bytes", 0.16)
        for name, variant in variants.items()
    ]
