from __future__ import annotations

import dataclasses
import json
import math
import random
import subprocess
import sys

import pytest

from qaware.errors import QawareError
from qaware.metrics.score import Score, _t975, fingerprint_of, half_width, paired, paired_accuracy


def score(losses=(2.0, 8.0), counts=(1, 3), **changes) -> Score:
    protocol = changes.pop("protocol", {"data": "d", "window": 4})
    fields = {
        "nats": sum(losses) / sum(counts) if counts else None,
        "perplexity": 12.2,
        "bits_per_byte": None,
        "accuracy": None,
        "kl": None,
        "top1": None,
        "ci95": half_width(losses, counts),
        "count": sum(counts),
        "seconds": 0.5,
        "fingerprint": fingerprint_of(protocol),
        "protocol": protocol,
        "losses": losses,
        "counts": counts,
        "extra": {},
    }
    return Score(**(fields | changes))


def test_half_width_by_hand():
    # mean 10/4; residuals 2 - 2.5 and 8 - 7.5; squares 0.5; times m/(m-1) = 2; se = 1/4; t(1 dof)
    assert half_width((2.0, 8.0), (1, 3)) == pytest.approx(_t975(1) / 4)
    # with equal counts it is the usual s / sqrt(m) of the window means
    assert half_width((1.0, 2.0, 3.0), (1, 1, 1)) == pytest.approx(_t975(2) / math.sqrt(3))


def test_half_width_needs_two_windows():
    assert half_width((2.0,), (5,)) is None


@pytest.mark.parametrize(
    ("dof", "exact", "relative"),
    [
        (1, 12.7062047, 0.12),
        (2, 4.3026527, 0.01),
        (3, 3.1824463, 2e-3),
        (10, 2.2281389, 1e-5),
        (10**6, 1.9599664, 1e-6),
    ],
)
def test_t_quantile(dof, exact, relative):
    assert _t975(dof) == pytest.approx(exact, rel=relative)


@pytest.mark.parametrize("windows", [6, 40])
def test_interval_covers_the_truth_95_times_in_100(windows):
    """Windows of different lengths whose tokens share a mean: treating tokens as independent fails here."""
    rng = random.Random(7)
    hits = naive = 0
    for _ in range(600):
        counts = [rng.randint(20, 40) for _ in range(windows)]
        means = [rng.gauss(3.0, 0.5) for _ in counts]
        losses = [n * rng.gauss(mean, 1.0 / math.sqrt(n)) for n, mean in zip(counts, means, strict=True)]
        error = abs(sum(losses) / sum(counts) - 3.0)
        hits += error <= half_width(losses, counts)
        naive += error <= 1.96 * math.sqrt(1.0 + 0.25) / math.sqrt(sum(counts))
    assert 0.93 <= hits / 600 <= 0.975
    assert naive / 600 < 0.75


def test_paired_difference_by_hand():
    a, b = score((2.0, 8.0)), score((1.0, 6.0))
    difference, width = paired(a, b)
    assert difference == 0.75  # (1 + 2) / 4
    assert width == pytest.approx(half_width((1.0, 2.0), (1, 3)))
    assert paired(b, a) == (-difference, width)


def test_paired_is_narrower_than_two_separate_intervals():
    a, b = score((10.1, 20.1, 31.0), (5, 5, 5)), score((10.0, 20.0, 30.0), (5, 5, 5))
    assert paired(a, b)[1] < a.ci95 / 10


def test_paired_with_itself_is_zero_and_one_window_knows_no_interval():
    assert paired(score(), score()) == (0.0, 0.0)
    assert paired(score((3.0,), (2,)), score((1.0,), (2,))) == (1.0, math.inf)


def test_paired_refuses_different_fingerprints_and_names_both():
    a, b = score(), score(protocol={"data": "d", "window": 8})
    with pytest.raises(QawareError, match=f"{a.fingerprint} and {b.fingerprint}.*window 4 against 8"):
        paired(a, b)


def test_paired_refuses_scores_without_losses():
    with pytest.raises(QawareError, match="do not pair up"):
        paired(score(), dataclasses.replace(score(), losses=(), counts=()))


def test_paired_accuracy_by_hand():
    a, b = score(hits=(1, 1, 1, 0, 0, 1)), score(hits=(0, 1, 0, 0, 1, 0))
    difference, width = paired_accuracy(a, b)  # 3 won, 1 lost, of 6; one more on each side: 4 and 2, of 8
    assert difference == pytest.approx(2 / 6)
    assert width == pytest.approx(1.959964 * math.sqrt((6 / 8 - (2 / 8) ** 2) / 8))
    assert paired_accuracy(b, a) == (-difference, width)


def test_paired_accuracy_of_equal_answers_is_not_certain():
    same = score(hits=(1, 0) * 50)
    assert paired_accuracy(same, same)[0] == 0
    assert 0.02 < paired_accuracy(same, same)[1] < 0.04


def test_the_interval_of_accuracy_covers_the_truth():
    rng, runs, covered = random.Random(0), 400, 0
    for _ in range(runs):
        b = [rng.random() < 0.9 for _ in range(300)]
        a = [hit if rng.random() < 0.95 else rng.random() < 0.5 for hit in b]  # 2% of what is right is lost
        difference, width = paired_accuracy(score(hits=tuple(map(int, a))), score(hits=tuple(map(int, b))))
        covered += abs(difference - 0.05 * (0.5 - 0.9)) <= width
    assert 0.93 * runs <= covered <= 0.995 * runs


def test_paired_accuracy_refuses():
    with pytest.raises(QawareError, match="hits: 0 and 0 samples"):
        paired_accuracy(score(), score())
    with pytest.raises(QawareError, match="window 4 against 8"):
        paired_accuracy(score(hits=(1,)), score(hits=(1,), protocol={"data": "d", "window": 8}))


def test_row_is_plain_json_without_arrays():
    row = score(perplexity=math.inf, extra={"accuracy": 0.5, "odd": math.nan}).row()
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    assert {field.name for field in dataclasses.fields(Score)} - set(row) == {"losses", "counts", "hits"}
    assert row["perplexity"] is None
    assert row["extra"] == {"accuracy": 0.5, "odd": None}
    assert row["protocol"] == {"data": "d", "window": 4}


def test_fingerprint_ignores_the_order_of_keys():
    assert fingerprint_of({"a": 1, "b": 2}) == fingerprint_of({"b": 2, "a": 1}) != fingerprint_of({"a": 1})


def test_importing_the_package_and_scores_is_light():
    code = (
        "import sys, qaware.metrics as m; m.Score, m.paired; assert 'Windows' in dir(m); "
        "bad = {'torch', 'evaluate', 'numpy', 'lightning'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_public_name():
    import qaware.metrics

    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        _ = qaware.metrics.nope
    assert all(getattr(qaware.metrics, name) is not None for name in qaware.metrics.__all__)
