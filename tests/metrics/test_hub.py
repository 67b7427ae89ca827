"""The real `evaluate` runs in one child process: it is slow to import and reads HF_HOME at import."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

import qaware.metrics.hub as hub
from qaware.errors import QawareError

LOCAL = """
import datasets
import evaluate


class Hits(evaluate.Metric):
    def _info(self):
        kind = datasets.Value("int64")
        features = datasets.Features({"predictions": kind, "references": kind})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        return {"hits": sum(p == r for p, r in zip(predictions, references))}
"""

CHILD = """
import json
import logging
import sys
import torch
torch.set_num_threads(1)
from qaware.errors import QawareError
from qaware.metrics import Windows, load_metric, score_language

out = {}
windows = Windows.from_batches([torch.tensor([[0, 1, 0, 1]])])
logits = torch.tensor([[[0.0, 1.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]]])
out["extra"] = score_language(lambda ids: logits, windows, extra=(sys.argv[1],)).extra
out["script"] = load_metric(sys.argv[1] + "/hits.py").compute(predictions=[1, 2], references=[1, 2])
out["disable"] = logging.root.manager.disable
out["handlers"] = len(logging.root.handlers)

import evaluate
from qaware.metrics.hub import SCRIPTS
out["perplexity"] = evaluate.load(str(SCRIPTS / "perplexity")).compute(predictions=[[0.5, 1.5], [4.0]])
out["overflow"] = load_metric("perplexity").compute(predictions=[[1e6]])["perplexity"]
rows = {"predictions": [[0.0, 0.0], [3.0, 0.0]], "references": [[0.0, 0.0], [0.0, 3.0]]}
out["kl"] = evaluate.load(str(SCRIPTS / "kl_divergence")).compute(**rows)
out["top1"] = load_metric("top1_agreement").compute(**rows)
metric = load_metric("top1_agreement")
metric.add_batch(predictions=[[1.0, 0.0]], references=[[1.0, 0.0]])
metric.add(prediction=[1.0, 0.0], reference=[0.0, 1.0])
out["added"] = metric.compute()
for key, name in (("missing", "no_such_metric"), ("community", "nobody/nothing")):
    try:
        load_metric(name)
    except QawareError as error:
        out[key] = str(error)
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def child(tmp_path_factory):
    """What the child printed, its stderr, and the files that it wrote, relative to its home."""
    home = tmp_path_factory.mktemp("home")
    script = home / "work" / "hits"
    script.mkdir(parents=True)
    (script / "hits.py").write_text(LOCAL)
    unset = ("HF_EVALUATE_CACHE", "HF_METRICS_CACHE", "HF_MODULES_CACHE", "XDG_CACHE_HOME")
    env = {key: value for key, value in os.environ.items() if key not in unset} | {
        "HOME": str(home),
        "HF_HOME": str(home / "hf"),
        "HF_HUB_OFFLINE": "1",
        "HF_EVALUATE_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(hub.__file__).parents[2]), os.environ.get("PYTHONPATH", "")]),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(script)], env=env, cwd=home / "work", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    written = {path.relative_to(home).as_posix() for path in home.rglob("*") if path.is_file()}
    return json.loads(done.stdout), done.stderr, written


def test_our_scripts_load_by_path_offline(child):
    out, _, _ = child
    assert out["perplexity"] == {
        "perplexity": pytest.approx(math.exp(2)),
        "nats": 2.0,
        "bits_per_token": pytest.approx(2 / math.log(2)),
    }
    p = 1 / (1 + math.exp(-3))
    assert out["kl"] == {"kl_divergence": pytest.approx(3 * (2 * p - 1) / 2)}
    assert out["top1"] == {"top1_agreement": 0.5}
    assert out["added"] == {"top1_agreement": 0.5}
    assert out["overflow"] == math.inf


def test_a_local_script_is_computed_on_argmax_and_targets(child):
    out, _, _ = child
    assert out["extra"] == {"hits": 2.0}
    assert out["script"] == {"hits": 2}


def test_unknown_metrics_name_the_way_out(child):
    out, _, _ = child
    for key, name in (("missing", "no_such_metric"), ("community", "nobody/nothing")):
        assert out[key].startswith(f"metric '{name}': cannot be loaded (")
        assert "give the path of a local `evaluate` script" in out[key]
        assert "\n" not in out[key]


def test_no_noise_and_nothing_outside_hf_home(child):
    out, stderr, written = child
    assert stderr == ""
    assert (out["disable"], out["handlers"]) == (0, 0)
    assert {path for path in written if not path.startswith("hf/")} == {"work/hits/hits.py"}


@pytest.mark.parametrize("name", ["/no/where", "./nope", "nope.py", "~/no_such_folder/x.py"])
def test_a_path_that_is_not_there(name):
    with pytest.raises(QawareError, match="there is no"):
        hub.load_metric(name)


@pytest.fixture
def fake(monkeypatch):
    """Stand in for `evaluate`; the list of what was asked of it."""
    asked = []
    module = types.ModuleType("evaluate")
    module.load = lambda target, **options: asked.append((target, options))
    monkeypatch.setitem(sys.modules, "evaluate", module)
    return asked


def test_names_resolve_to_scripts_paths_or_the_hub(fake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "accuracy").mkdir()  # a folder without a script does not hide the hub's metric
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "mine.py").touch()
    for name in ("perplexity", "accuracy", "mine", "user/metric"):
        hub.load_metric(name)
    targets = [target for target, _ in fake]
    own, local = hub.SCRIPTS / "perplexity" / "perplexity.py", tmp_path / "mine" / "mine.py"
    assert targets == [str(own), "accuracy", str(local), "user/metric"]
    assert all(options == {"keep_in_memory": True} for _, options in fake)


def test_every_name_of_ours_has_a_script():
    assert {path.parent.name for path in hub.SCRIPTS.glob("*/*.py")} == set(hub.OWN)
    assert all((hub.SCRIPTS / name / f"{name}.py").is_file() for name in hub.OWN)


@pytest.mark.parametrize("name", hub.OWN)
def test_our_own_are_no_extras(name):
    with pytest.raises(QawareError, match="measured already"):
        hub.load_extra([name])


class Metric:
    def __init__(self, result):
        self.result = result

    def compute(self, **_):
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


def test_numbers_are_named_after_the_metric():
    metrics = {"accuracy": Metric({"accuracy": 0.5}), "a/glue": Metric({"f1": 1, "list": [1]})}
    assert hub.compute_extra(metrics, [1], [1]) == {"accuracy": 0.5, "glue.f1": 1.0}


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (ValueError("expected strings\nand more"), r"failed on integer .*\(ValueError: expected strings\)"),
        ({"list": [1]}, "returned no number"),
        (None, "returned no number"),
    ],
)
def test_a_metric_that_does_not_fit(result, message):
    with pytest.raises(QawareError, match=message):
        hub.compute_extra({"odd": Metric(result)}, [1], [1])
