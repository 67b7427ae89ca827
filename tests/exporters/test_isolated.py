"""IsolatedRunner: whatever a runtime does to its process, this one goes on and says what happened."""

from __future__ import annotations

import gc
import os
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qaware.errors import QawareError, RuntimeDiedError
from qaware.exporters.artifact import Artifact
from qaware.exporters.isolated import IsolatedRunner
from qaware.exporters.signature import Signature, TensorSpec
from qaware.files import sha256

ROOT = Path(__file__).parents[2]
SIGNATURE = Signature(
    (TensorSpec("code", "int64", (), 0, 99), TensorSpec("x", "float32", ("n",), keyword="x")),
    {"n": (0, 10**6)},
)

# The file's content says how it behaves on loading, the first input how on a call.
PLUGIN = """
import os, sys, time
import numpy as np
from qaware.exporters.base import Exporter, Tolerance

class Echo(Exporter):
    name, suffix, tolerance = "echo", ".echo", Tolerance(1e-3, 1e-3, "none")

    def refuse(self, decision):
        return None

    def write(self, quantized, example, signature, path):
        raise NotImplementedError

    def open(self, path, signature):
        {"good": lambda: None, "raise": self.fail, "abort": self.die}[path.read_text()]()
        print("loaded, said on stdout")
        os.system("echo and from a child of the child")
        return self.run

    def fail(self):
        raise RuntimeError("\\n  the model is of version 7\\nsecond line")

    def die(self):
        sys.stderr.write("first\\nsecond\\nassertion failed: x > 0\\nat model.cpp:12\\n")
        sys.stderr.flush()
        os.abort()

    def run(self, code, x):
        code = int(code)
        if code == 1:
            self.fail()
        if code == 2:
            self.die()
        if code == 3:
            print("noise on stdout" * 1000, flush=True)
        if code == 4:
            return "no tensor"
        if code == 5:
            return x.double() * 2
        return x

class Bare(Echo):
    name, packages, extra = "bare", ("no_such_package",), "bare"
"""


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The plugin on the path of child processes, as pip would install it."""
    folder = tmp_path_factory.mktemp("plugin")
    (folder / "echo_plugin.py").write_text(PLUGIN)
    info = folder / "echo-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: echo\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[qaware.exporters]\necho = echo_plugin:Echo\nbare = echo_plugin:Bare\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{ROOT}")
        yield folder


def artifact(folder: Path, behaviour: str, runtime: str = "echo") -> Artifact:
    path = folder / f"{behaviour}.echo"
    path.write_text(behaviour)
    made = Artifact(path, runtime, SIGNATURE, {}, {}, sha256(path), path.stat().st_size)
    made.save()
    return made


def call(runner: IsolatedRunner, code: int, x: Tensor) -> Tensor:
    return runner(torch.tensor(code), x)


def test_one_runner_through_everything_that_it_survives_and_its_death(plugin: Path, tmp_path: Path) -> None:
    x = torch.randn(1000)
    with IsolatedRunner(artifact(tmp_path, "good")) as runner:
        assert torch.equal(call(runner, 0, x), x)
        assert torch.equal(call(runner, 3, x), x)  # what it prints is not mixed with the answer
        assert call(runner, 5, x).dtype == torch.float32
        assert call(runner, 0, torch.zeros(0)).shape == (0,)
        assert torch.equal(call(runner, 0, x[::2]), x[::2])
        big = torch.randn(10**6)
        assert torch.equal(call(runner, 0, big.requires_grad_()), big)
        # Inputs that are not legal never reach it.
        with pytest.raises(QawareError, match="code: value 100 is outside 0 to 99"):
            call(runner, 100, x)
        with pytest.raises(QawareError, match=r"x: dtype is torch\.float64"):
            call(runner, 0, x.double())
        with pytest.raises(QawareError, match=r"inputs: got 1, the model takes 2 \(code, x\)"):
            runner(torch.tensor(0))
        # An error of the runtime is one line, and the runner goes on.
        with pytest.raises(QawareError) as caught:
            call(runner, 1, x)
        assert str(caught.value) == "good.echo on echo: RuntimeError: the model is of version 7"
        assert not isinstance(caught.value, RuntimeDiedError)
        with pytest.raises(QawareError, match="AttributeError"):
            call(runner, 4, x)
        assert torch.equal(call(runner, 0, x), x)
        assert children()
        # It dies; every later call says so too, and leaving the block hides nothing.
        for _ in range(3):
            with pytest.raises(RuntimeDiedError) as died:
                call(runner, 2, big.detach())
            assert "good.echo: the process of echo was killed by SIGABRT" in str(died.value)
            assert "it said: second | assertion failed: x > 0 | at model.cpp:12" in str(died.value)


def test_a_missing_package_names_the_extra(plugin: Path, tmp_path: Path) -> None:
    why = r"bare: package 'no_such_package' is not installed; pip install 'qaware\[bare\]'$"
    with pytest.raises(QawareError, match=rf"^good\.echo on bare: cannot be loaded: {why}"):
        IsolatedRunner(artifact(tmp_path, "good", "bare"))


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ("raise", "raise.echo on echo: cannot be loaded: RuntimeError: the model is of version 7"),
        (
            "abort",
            "abort.echo: the process of echo was killed by SIGABRT; it said: second | assertion failed",
        ),
    ],
)
def test_a_runtime_that_does_not_load(plugin: Path, tmp_path: Path, behaviour: str, message: str) -> None:
    made = artifact(tmp_path, behaviour)
    before = children()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(QawareError) as caught:
            IsolatedRunner(made)
        assert str(caught.value).startswith(message)
        assert isinstance(caught.value, RuntimeDiedError) is (behaviour == "abort")
        del caught
        gc.collect()  # a child that is not waited for would warn here
    assert children() == before


def children() -> set[str]:
    """Processes, zombies too, that this one started."""
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


def test_a_damaged_file_starts_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = artifact(tmp_path, "good")
    made.path.write_text("evil")
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a process was started"))
    with pytest.raises(QawareError, match="is damaged"):
        IsolatedRunner(made)


def test_a_runtime_that_is_killed_and_closed_twice(plugin: Path, tmp_path: Path) -> None:
    runner = IsolatedRunner(artifact(tmp_path, "good"))
    os.kill(runner._child.pid, signal.SIGKILL)
    runner._child.wait()
    for _ in range(2):
        with pytest.raises(RuntimeDiedError, match="killed by SIGKILL"):
            call(runner, 0, torch.zeros(4))
    runner.close()
    runner.close()


def test_calls_that_are_started_before_their_turn(plugin: Path, tmp_path: Path) -> None:
    with IsolatedRunner(artifact(tmp_path, "good")) as runner:
        inputs = [
            torch.full((size,), float(size)) for size in (3, 10**5, 10**5 - 1, 5, 2)
        ]  # of both ways to travel
        first, second, *others = (runner.submit(torch.tensor(5), x) for x in inputs)
        assert torch.equal(second.get(), 2 * inputs[1])  # which receives the first too
        for x, answer in zip((inputs[0], *inputs[2:]), (first, *others), strict=True):
            assert torch.equal(answer.get(), 2 * x)
            assert torch.equal(answer.get(), 2 * x)
            assert 0 < answer.seconds < 60
        assert sum(answer.seconds for answer in (first, second)) < 60


def test_an_answer_that_nobody_asks_for_is_not_taken_for_another(plugin: Path, tmp_path: Path) -> None:
    with IsolatedRunner(artifact(tmp_path, "good")) as runner:
        broken = runner.submit(torch.tensor(1), torch.zeros(2))
        assert torch.equal(call(runner, 0, torch.ones(3)), torch.ones(3))
        with pytest.raises(QawareError, match="100 is outside 0 to 99"):
            runner.submit(torch.tensor(100), torch.zeros(2))
        with pytest.raises(QawareError, match="the model is of version 7"):
            broken.get()


def test_a_runtime_that_dies_with_a_call_waiting(plugin: Path, tmp_path: Path) -> None:
    with IsolatedRunner(artifact(tmp_path, "good")) as runner:
        answers = [runner.submit(torch.tensor(code), torch.zeros(2)) for code in (0, 2)]
        assert answers[0].get().shape == (2,)
        for _ in range(2):
            with pytest.raises(RuntimeDiedError, match="SIGABRT"):
                answers[1].get()
        with pytest.raises(RuntimeDiedError, match="SIGABRT"):
            call(runner, 0, torch.zeros(2))
