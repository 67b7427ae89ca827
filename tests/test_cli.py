"""The command line as a user meets it: a process, its output, its exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qaware.cli import main
from qaware.exporters.artifact import Artifact
from qaware.exporters.signature import Signature, TensorSpec
from qaware.files import sha256
from qaware.recipe import recipe_names

ROW = {
    "model": "float",
    "stage": "float",
    "bytes": 1000,
    "nats": 2.0,
    "perplexity": 7.389,
    "fingerprint": "f",
}


def test_recipes_are_listed_and_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in recipe_names())
    assert main(["recipes", "int8-dynamic"]) == 0
    assert "activation: int8-dynamic" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recipes", "int8-dynamc"], "did you mean 'int8-dynamic'?"),
        (["rn"], "rn"),
        (["run"], "config"),
        (["run", "x.yaml", "--trus", "a"], "--trus"),
        (["run", "missing.yaml"], "missing.yaml: cannot be read"),
        (["report", "missing"], "results.jsonl: cannot be read"),
        (["evaluate", "missing.pte", "--data", "x.txt"], "missing.pte: no such artifact"),
        (["evaluate", "missing.pte"], "data"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert len(captured.err.strip().splitlines()) == 1
    assert captured.err.startswith("qaware: error: ")


@pytest.mark.parametrize("metadata", [{"tokenizer": "tokenizer"}, {}])
def test_an_artifact_without_what_scoring_needs_is_refused(
    metadata: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tokenizer").mkdir()
    path = tmp_path / "a.pte"
    path.write_text("a program")
    signature = Signature((TensorSpec("input_ids", "int64", (1, "seq")),), {"seq": (1, 16)})
    Artifact(path, "executorch", signature, {}, {}, sha256(path), 9, metadata=metadata).save()
    assert main(["evaluate", str(path), "--data", "x.txt"]) == 2
    assert "has neither tokenizer beside it and data in its sidecar nor" in capsys.readouterr().err


def test_report_is_rebuilt_from_what_a_killed_run_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "quickstart" / "20260101-000000"
    run.mkdir(parents=True)
    (run / "results.jsonl").write_text(json.dumps(ROW) + "\n" + '{"model": "fl')
    (run / "run.json").write_text(json.dumps({"name": "quickstart", "status": "not finished"}))
    assert main(["report", str(tmp_path / "quickstart")]) == 0
    assert "2.0000" in capsys.readouterr().out
    assert "This run is not finished" in (run / "report.md").read_text()


def test_help_imports_no_torch() -> None:
    code = "import sys; from qaware.cli import main\ntry: main(['run', '--help'])\nexcept SystemExit: pass\n"
    heavy = ("torch", "lightning", "torchao", "transformers", "evaluate")
    code += f"print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    assert done.stdout.strip().endswith("[]")
    assert "key=value" in done.stdout


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    code = "import sys; from qaware.cli import main; sys.exit(main(['recipes']))"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ
    ) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.close()
        assert child.stderr.read() == b""
    assert child.returncode == 141


def test_without_a_command_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "evaluate" in capsys.readouterr().out
