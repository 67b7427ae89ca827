"""docs/add-a-runtime.md: its package is installed, checked, exported to, compared and scored."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import registered_levels  # noqa: F401, with integers of more bits than the scheme has
import torch
from pages import ROOT, blocks, install
from torch import nn

import qaware
from qaware.cli import main
from qaware.exporters import get_exporter
from qaware.exporters.artifact import Artifact
from qaware.exporters.base import Exporter
from qaware.exporters.check import check
from qaware.exporters.signature import Signature, TensorSpec
from qaware.parity import compare
from qaware.recipe import Recipe
from qaware.report.ledger import read_rows

PAGE = ROOT / "docs" / "add-a-runtime.md"
TRUST = ["--trust", "digits"]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("runtime")
    with pytest.MonkeyPatch.context() as patch:
        install(PAGE, folder, patch)
        patch.chdir(folder)
        yield folder


@pytest.fixture(scope="module")
def numpy_runtime(package: Path) -> Exporter:
    return get_exporter("numpy")


def recipe(**scheme: Any) -> Recipe:
    return Recipe.from_dict({"rules": [{"type": "Linear", "scheme": scheme}]})


def signature(width: int) -> Signature:
    return Signature((TensorSpec("x", "float32", ("batch", width)),), {"batch": (1, 64)})


def test_the_page_runs(package: Path) -> None:
    scope: dict[str, Any] = {"__name__": "page"}
    for block in blocks(PAGE):
        exec(compile(block, PAGE.name, "exec"), scope)
    assert scope["logits"].shape == (200, 10)
    assert Artifact.open(scope["artifact"].path).details == {"steps": ["linear", "relu", "linear"]}


@pytest.fixture(scope="module")
def run(package: Path) -> Path:
    """The run folder of the page's experiment."""
    pytest.importorskip("sklearn")
    assert main(["run", "digits.yaml", "trainer.enable_progress_bar=false", *TRUST]) == 0
    return next((package / "runs" / "digits").iterdir())


def test_an_experiment_scores_it(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = {row["stage"]: row for row in read_rows(run / "results.jsonl")}
    assert rows["numpy"]["nats"] == pytest.approx(rows["converted"]["nats"], abs=1e-6)
    assert rows["numpy"]["accuracy"] == rows["converted"]["accuracy"]
    (path,) = (run / "artifacts").glob("*.npz")
    parity = Artifact.open(path).parity
    assert parity is not None
    assert parity["relative"] < 1e-6
    assert main(["evaluate", str(path), "--data", "sklearn-digits"]) == 0
    assert "numpy" in capsys.readouterr().out


def test_check_refuses_before_training_and_names_the_nearest(
    package: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", "digits.yaml", *TRUST]) == 0
    assert "int4 g32" in capsys.readouterr().out
    entry = "quantize=[{recipe: int8-dynamic, target: network, export: [numpy]}]"
    assert main(["check", "digits.yaml", entry, *TRUST]) == 2
    said = capsys.readouterr().err
    assert "numpy: does not round activations, and int8 channel + int8-dynamic does" in said
    assert "nearest legal: int8 channel, by the first rule" in said


def test_a_callback_scores_it(package: Path) -> None:
    pytest.importorskip("sklearn")
    import lightning.pytorch as pl
    from digits import Digits  # type: ignore[import-not-found]

    from qaware.vision import ImageDataModule

    qat = qaware.QuantizationAwareTraining("int4-weight-only", target="network", export=["numpy"])
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(accelerator="cpu", max_steps=3, callbacks=[qat], **quiet)
    data = ImageDataModule("sklearn-digits", val_fraction=0.3, batch_size=32, max_images=200)
    trainer.fit(Digits(), datamodule=data)
    assert qat.result is not None
    assert qat.result.scores["numpy"].nats == pytest.approx(qat.result.scores["converted"].nats, abs=1e-6)
    assert qat.result.artifacts["numpy"].path.suffix == ".npz"


@pytest.mark.parametrize("expand", ["load", "call"])
@pytest.mark.parametrize(
    "scheme",
    [
        {"bits": 1},
        {"bits": 2, "levels": "stretched", "group_size": 5},
        {"bits": 3, "levels": "stretched"},
        {"bits": 4, "symmetric": False, "group_size": 3},
        {"bits": 4, "levels": "test-fp4", "group_size": 5},
        {"bits": 5, "scale_dtype": "bfloat16"},
        {"bits": 8, "symmetric": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_odd_widths_layers_that_come_again_and_half_precision(
    numpy_runtime: Exporter, scheme: dict[str, Any], expand: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    again, relu = nn.Linear(15, 15), nn.ReLU()
    inner = nn.Sequential(again, relu, nn.Dropout(), again, relu)
    network = nn.Sequential(inner, nn.Linear(15, 15, bias=False), nn.Linear(15, 2)).to(dtype).eval()
    network[1].weight = again.weight
    quantized = qaware.quantize(network, recipe(**scheme))
    runtime = get_exporter({"numpy": {"expand": expand}})
    inputs, x = signature(15), torch.randn(3, 15)
    path = runtime.export(quantized, (x[:1],), inputs, tmp_path / "odd.npz").path
    reference = inputs.wrap(runtime.reference(quantized)).eval()
    parity = compare(runtime.open(path, inputs), reference, [(x,)])
    parity.require("odd.npz", runtime.tolerance)


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (nn.Sequential(nn.Linear(8, 8), nn.Tanh()), "numpy: 1 is a Tanh; it runs an nn.Sequential of"),
        (nn.Linear(8, 8), None),
        (nn.Sequential(nn.Flatten(0), nn.Linear(8, 8)), "numpy: 0 is a Flatten"),
    ],
    ids=str,
)
def test_a_network_that_it_cannot_run(
    numpy_runtime: Exporter, network: nn.Module, words: str | None, tmp_path: Path
) -> None:
    quantized = qaware.quantize(network, recipe(bits=8))
    if words is None:
        numpy_runtime.export(quantized, (torch.randn(1, 8),), signature(8), tmp_path / "x.npz")
        return
    with pytest.raises(qaware.QawareError, match=words):
        numpy_runtime.export(quantized, (torch.randn(1, 8),), signature(8), tmp_path / "x.npz")
    assert not list(tmp_path.iterdir())


def test_what_it_refuses_before_the_run(numpy_runtime: Exporter) -> None:
    network = nn.Sequential(nn.Embedding(4, 8), nn.Linear(8, 8))
    rules = [{"name": "*", "scheme": {"bits": 8}}]
    said = [str(p) for p in check(Recipe.from_dict({"rules": rules}).match(network), [numpy_runtime])]
    assert said == [
        "has linear layers only, and the model has Embedding",
        "0: numpy: has linear layers only, no Embedding",
    ]
    with pytest.raises(qaware.QawareError, match=r"expand: 'never' is not one of load, call"):
        get_exporter({"numpy": {"expand": "never"}})
    with pytest.raises(qaware.QawareError, match=r"export\.numpy\.expnd: is no option .* expand"):
        get_exporter({"numpy": {"expnd": "load"}})
