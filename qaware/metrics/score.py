"""The result of one scoring run, its uncertainty, and the only way to subtract two of them.

Plain Python: a report is rebuilt from stored scores without importing torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from qaware.errors import QawareError

_PER_WINDOW = ("losses", "counts", "hits")


@dataclass(frozen=True)
class Score:
    """Quality of one model or runner on fixed data. A field that was not measured is None."""

    nats: float | None
    """Mean negative log-likelihood: nats per scored token, or per sample for a classifier."""
    perplexity: float | None
    """exp(nats) for a language model; infinite where that overflows a float64."""
    bits_per_byte: float | None
    """All nats in bits, over the bytes of the scored text: comparable across tokenizers."""
    accuracy: float | None
    """Share of samples whose label is the argmax (classifiers only)."""
    kl: float | None
    """Mean KL(float || this) in nats per token or sample."""
    top1: float | None
    """Share of tokens or samples whose argmax equals the float model's."""
    ci95: float | None
    """Half width of a 95% interval of ``nats`` (see `half_width`); None with fewer than 2 windows."""
    count: int
    """Scored tokens or samples."""
    seconds: float
    """Wall time inside the predict calls, added up over ranks."""
    fingerprint: str
    """Short hash of ``protocol``: scores with different ones are never subtracted."""
    protocol: dict[str, Any]
    """What was counted and how, as plain JSON values."""
    losses: tuple[float, ...]
    """Summed nats of each window (of each sample for a classifier), in the order of the data."""
    counts: tuple[int, ...]
    """Scored tokens of each window; 1 for each sample."""
    extra: dict[str, float]
    """Other `evaluate` metrics, by name."""
    sqnr: float | None = None
    """Signal to quantization noise of the logits in dB, 10 log10(sum r^2 / sum (r - x)^2), where r are the
    float model's (classifiers only); infinite where they are equal."""
    hits: tuple[int, ...] = ()
    """For each sample 1 where the label is the argmax, else 0 (classifiers only)."""

    def row(self) -> dict[str, Any]:
        """This score as plain JSON values, without the arrays that have one entry a window.

        JSON has no infinity, so a value that is not finite becomes None.
        """
        fields = (field.name for field in dataclasses.fields(self) if field.name not in _PER_WINDOW)
        row = {name: _plain(getattr(self, name)) for name in fields}
        row["extra"] = {name: _plain(value) for name, value in self.extra.items()}
        row["protocol"] = dict(self.protocol)
        return row


def paired(a: Score, b: Score) -> tuple[float, float]:
    """How much worse ``a`` is than ``b``: (nats of a minus nats of b, half width of its 95% interval).

    The interval comes from the differences window by window. Two models find the same windows hard, so
    it is much narrower than the two separate intervals suggest. It is infinite with one window.

    Raises QawareError for scores of different protocols, or that hold no losses.
    """
    _require_same_protocol(a, b)
    if a.counts != b.counts or len(a.losses) != len(b.losses) or not a.losses:
        raise QawareError(
            f"losses: {len(a.losses)} and {len(b.losses)} windows do not pair up under fingerprint "
            f"{a.fingerprint}; compare two complete scores that kept their per-window losses"
        )
    differences = tuple(x - y for x, y in zip(a.losses, b.losses, strict=True))
    width = half_width(differences, a.counts)
    return math.fsum(differences) / sum(a.counts), math.inf if width is None else width


def paired_accuracy(a: Score, b: Score) -> tuple[float, float]:
    """How much more accurate ``a`` is than ``b``: (share of a minus share of b, half width of its 95%
    interval).

    The width comes from the samples that only one of them gets right, with one more on each side, so that
    it is not zero where there are none (Bonett and Price 2012, "Adjusted Wald Confidence Interval for a
    Difference of Binomial Proportions Based on Paired Data", J. Educ. Behav. Stat. 37(4)).

    Raises QawareError for scores of different protocols, or that are not of classifiers.
    """
    _require_same_protocol(a, b)
    if len(a.hits) != len(b.hits) or not a.hits:
        raise QawareError(
            f"hits: {len(a.hits)} and {len(b.hits)} samples do not pair up under fingerprint "
            f"{a.fingerprint}; compare two complete scores of classifiers"
        )
    count = len(a.hits)
    won = sum(x > y for x, y in zip(a.hits, b.hits, strict=True))
    lost = sum(x < y for x, y in zip(a.hits, b.hits, strict=True))
    p, q = (won + 1) / (count + 2), (lost + 1) / (count + 2)
    return (won - lost) / count, NormalDist().inv_cdf(0.975) * math.sqrt((p + q - (p - q) ** 2) / (count + 2))


def _require_same_protocol(a: Score, b: Score) -> None:
    if a.fingerprint != b.fingerprint:
        raise QawareError(
            f"fingerprint: {a.fingerprint} and {b.fingerprint} are different protocols "
            f"({_differing(a.protocol, b.protocol)}); score both models on the same data and windows"
        )


def half_width(losses: Sequence[float], counts: Sequence[int]) -> float | None:
    """Half width of the 95% interval of sum(losses) / sum(counts); None with fewer than 2 windows.

    Tokens of one window share their text, so they are not independent: windows are the unit. This is the
    cluster-robust standard error (Miller 2024, "Adding error bars to evals", arXiv:2411.00640, clustered
    standard errors) in the form of a ratio estimator (Cochran, "Sampling Techniques", ch. 6), which allows
    for windows of different lengths, with the m / (m - 1) correction and Student's t for few windows.
    """
    windows = len(losses)
    if windows < 2:
        return None
    total = sum(counts)
    mean = math.fsum(losses) / total
    squares = math.fsum((loss - mean * count) ** 2 for loss, count in zip(losses, counts, strict=True))
    return _t975(windows - 1) * math.sqrt(squares * windows / (windows - 1)) / total


def fingerprint_of(protocol: Mapping[str, Any]) -> str:
    """16 hex digits of the sha256 of ``protocol`` as JSON with sorted keys and no spaces."""
    canonical = json.dumps(protocol, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def _t975(dof: int) -> float:
    """97.5% point of Student's t by its expansion in 1/dof (Abramowitz and Stegun, 26.7.5).

    Too small by 11% at 1 degree of freedom, by 0.8% at 2, 0.12% at 3, and 4e-6 at 10.
    """
    z = NormalDist().inv_cdf(0.975)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return math.fsum(term / dof**power for power, term in enumerate(terms))


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    """The protocol's keys that two scores disagree on, for the error message."""
    keys = [key for key in sorted({*a, *b}) if a.get(key) != b.get(key)]
    return "; ".join(f"{key} {a.get(key)!r} against {b.get(key)!r}" for key in keys) or "no key differs"
