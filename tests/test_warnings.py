"""The default path needs nothing of ``torch.ao.quantization``, which PyTorch has announced to remove, and
prints no warning about quantization.

torch 2.13 imports that package itself: ``torch/__init__.py`` imports ``torch.quantization``, which imports
it, and torchao imports ``torch._inductor.decomposition``, which imports the operators declared in
``torch.ao.quantization.fx._decomposed``. So the import cannot simply be refused. Here every module of the two
packages is an empty one whose names are stand-ins that cannot be called, but for that one file of operators:
the code of torch.ao.quantization is not there, and whoever uses it fails.

The exporters are no part of this: AOTInductor was seen to work in the same way, ExecuTorch and torch_to_nnef
import a few names of torch.ao.quantization and so wait for their own releases.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import subprocess
import sys
import types
import warnings
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any, NoReturn

import pytest

REFUSED = ("torch.ao.quantization", "torch.quantization")
OPERATORS = "torch.ao.quantization.fx._decomposed"
READ_BY_TORCH = {
    "torch.ao.quantization.utils.determine_qparams",
    "torch.ao.quantization.utils.validate_qmin_qmax",
}
"""By the file of operators, for those that are not called here."""
ABOUT = r"(?i).*(torch\.ao|torch\.quantization|torchao|quantize_per_|quantized|q(u)?int(8|32))"


class NotThere(type):
    """The class of a stand-in: it may be imported, subclassed and asked for, but never made."""

    def __call__(cls, *args: Any, **kwargs: Any) -> NoReturn:
        raise AssertionError(f"{cls.__name__} was used")


class Empty(types.ModuleType):
    """A module without code."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        READ.add(f"{self.__name__}.{name}")
        return NotThere(f"{self.__name__}.{name}", (), {})


READ: set[str] = set()


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives an empty module for everything of the two packages."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name == OPERATORS:
            package = importlib.util.find_spec("torch")
            assert package is not None
            assert package.origin is not None
            file = Path(package.origin).parent.joinpath(*name.split(".")[1:]).with_suffix(".py")
            return importlib.util.spec_from_file_location(name, file)
        if any(name == root or name.startswith(f"{root}.") for root in REFUSED):
            return ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        return Empty(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def train_and_quantize(recipe: str) -> None:
    """QAT and PTQ through Trainers of a user who silences nothing, each with its converted model scored."""
    import lightning.pytorch as pl
    from lit import LitLM, loader

    from qaware import PostTrainingQuantization, QuantizationAwareTraining

    quiet = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "max_epochs": 1}
    qat, ptq = QuantizationAwareTraining(recipe), PostTrainingQuantization(recipe)
    model = LitLM()
    pl.Trainer(callbacks=[qat], **quiet).fit(model, loader(), loader(9))
    pl.Trainer(callbacks=[ptq], **quiet).validate(LitLM(), loader(9), verbose=False)
    assert qat.result is not None
    assert ptq.result is not None
    assert qat.result.scores["converted"].nats == qat.result.scores["prepared"].nats
    assert ptq.result.scores["converted"].nats > 0


def show_that_it_can_fail(blocked: bool) -> None:
    """What was forbidden above is noticed."""
    import torch

    with pytest.raises(UserWarning, match="deprecated"):
        torch.quantize_per_tensor(torch.zeros(2), 0.1, 0, torch.quint8)
    if blocked:
        with pytest.raises(AssertionError, match="QuantStub was used"):
            torch.ao.quantization.QuantStub()


def main(blocked: bool) -> None:
    """In a process of its own: this must come before torch is imported."""
    if blocked:
        sys.meta_path.insert(0, Finder())
    warnings.filterwarnings("error", message=ABOUT)
    warnings.filterwarnings("error", module=r"(torch\.(ao\.)?quantization|torchao)\b")
    warnings.filterwarnings("error", category=DeprecationWarning, module="qaware")
    for recipe in ("int8-static", "int8-dynamic-int4-weight"):
        train_and_quantize(recipe)
    print(sorted(READ))
    show_that_it_can_fail(blocked)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(__file__).parent / "callbacks"), *sys.path])
    command = [sys.executable, "-W", "always", __file__, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_case_12_nothing_needs_the_deprecated_package() -> None:
    """Lightning #9808 #9878 #9899 #13177 #13386 #16609, fms-model-optimizer #210, pytorch #184982: the
    callback broke with each release of torch."""
    done = run("blocked")
    assert done.returncode == 0, done.stderr[-3000:]
    read = set(eval(done.stdout.splitlines()[-1]))
    assert read >= READ_BY_TORCH, "the modules were not the empty ones"
    assert {name for name in read if name.startswith("torch.ao.")} == READ_BY_TORCH


def test_a_user_is_told_nothing_about_deprecated_quantization() -> None:
    done = run()
    assert done.returncode == 0, done.stderr[-3000:]
    told = [line for line in done.stderr.splitlines() if "arning" in line or "deprecated" in line]
    assert [line for line in told if "torch" in line.lower() or "quant" in line.lower()] == []


if __name__ == "__main__":
    main("blocked" in sys.argv)
