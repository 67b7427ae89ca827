"""What LiteRT refuses, before a run and while it exports, and files that it does not load."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qaware.errors import QawareError
from qaware.exporters import get_exporter
from qaware.exporters.check import check
from qaware.exporters.signature import Signature, TensorSpec
from qaware.recipe import Recipe
from qaware.scheme import Scheme

sys.path.insert(0, str(Path(__file__).parent))
from tiny import SIGNATURE, TinyLM, quantize, tokens

EXPORTER = get_exporter("litert")
needs_litert = pytest.mark.skipif(EXPORTER.missing() is not None, reason=str(EXPORTER.missing()))
BLOCK = {"bits": 4, "group_size": 32, "activation": "int8-dynamic", "scale_dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("scheme", "why", "nearest"),
    [
        ({**BLOCK, "symmetric": False}, "have no zero points in LiteRT", BLOCK),
        ({**BLOCK, "group_size": 16}, "are 32, 64, 128, 256 weights with bfloat16 scales", BLOCK),
        # A group of all 64 is one scale per channel, which 0 says.
        ({**BLOCK, "scale_dtype": "float32"}, "with bfloat16 scales", {"bits": 4}),
        ({**BLOCK, "bits": 8}, "one scale per channel; no groups", {**BLOCK, "bits": 8, "group_size": 0}),
    ],
    ids=str,
)
def test_refuses_what_int8_products_have_not(scheme: dict[str, Any], why: str, nearest: dict) -> None:
    plan = Recipe.load({"rules": [{"name": "gate_proj", "scheme": scheme}]}).match(TinyLM())
    (problem,) = [p for p in check(plan, [EXPORTER]) if p.layer]
    assert why in problem.message
    assert problem.nearest is not None
    assert problem.nearest == Scheme(**{**nearest, "activation": "int8-dynamic"})


def test_refuses_groups_in_a_convolution() -> None:
    plan = Recipe.load({"rules": [{"name": "0", "scheme": {"bits": 4, "group_size": 24}}]})
    (problem,) = [p for p in check(plan.match(nn.Sequential(nn.Conv1d(16, 8, 3))), [EXPORTER]) if p.layer]
    assert "use group_size: 0" in problem.message
    assert problem.nearest is not None
    assert problem.nearest.to_dict() == {"bits": 4}


def test_refuses_int8_activations_of_one_output() -> None:
    plan = Recipe.load({"rules": [{"name": "0", "scheme": {"bits": 8, "activation": "int8-dynamic"}}]})
    (problem,) = [p for p in check(plan.match(nn.Sequential(nn.Linear(8, 1))), [EXPORTER]) if p.layer]
    assert "one output" in problem.message
    assert problem.nearest is not None
    assert problem.nearest.activation == "none"


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "ai_edge_litert" else found(name)
    )
    monkeypatch.setattr(EXPORTER, "packages", ("ai_edge_litert",), raising=False)
    assert EXPORTER.missing() == (
        "litert: package 'ai_edge_litert' is not installed; pip install 'qaware[litert]'"
    )


class Ahead(nn.Module):
    """Every token sees all."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(96, 32), nn.Linear(32, 8)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.head(x + x.mean(1, keepdim=True))


class Pooled(Ahead):
    """One output a text."""

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids).mean(1))


@needs_litert
@pytest.mark.parametrize("kind", [Ahead, Pooled])
def test_models_that_look_ahead_need_fixed_sizes(tmp_path: Path, kind: type[nn.Module]) -> None:
    import qaware

    quantized = qaware.quantize(kind().eval(), "int8-weight-only", runtimes=["litert"])
    with pytest.raises(QawareError, match="padding 'seq' to 64 changes what this model computes; export it"):
        EXPORTER.export(quantized, (tokens(8),), SIGNATURE, tmp_path / "a.tflite")
    fixed = Signature((TensorSpec("ids", "int64", (1, 8), 0, 95),))
    EXPORTER.export(quantized, (tokens(8),), fixed, tmp_path / "a.tflite")
    expected = quantized.module(tokens(8, 1))
    assert torch.allclose(EXPORTER.open(tmp_path / "a.tflite", fixed)(tokens(8, 1)), expected, atol=1e-5)


@needs_litert
def test_a_weight_that_is_not_in_the_file_is_an_error(tmp_path: Path) -> None:
    quantized = quantize("int8-weight-only")
    quantized.module.gate_proj.forward = lambda x: x.repeat(1, 1, 2)[..., :96]
    with pytest.raises(QawareError, match="gate_proj: its weight is not in the converted file as it is"):
        EXPORTER.export(quantized, (tokens(8),), SIGNATURE, tmp_path / "a.tflite")
    assert list(tmp_path.iterdir()) == []


@needs_litert
def test_an_operator_that_litert_has_not_is_an_error() -> None:
    from qaware.exporters.litert_convert import convert
    from qaware.exporters.litert_flatbuffer import Flatbuffer

    file = Flatbuffer(convert({"serve": (nn.ReLU(), (torch.zeros(1, 2),))}, []))
    file.require_builtin()
    file.model.operatorCodes[0] = file.schema.OperatorCodeT(
        deprecatedBuiltinCode=127, builtinCode=file.schema.BuiltinOperator.STABLEHLO_CUSTOM_CALL
    )
    with pytest.raises(
        QawareError, match="leaves STABLEHLO_CUSTOM_CALL in the file, an operator that LiteRT"
    ):
        file.require_builtin()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("litert") / "whole.tflite"
    EXPORTER.export(quantize("int8-weight-only"), (tokens(8),), SIGNATURE, path)
    return path


@needs_litert
@pytest.mark.parametrize("damage", ["halved", "truncated", "empty", "text", "absent"])
def test_a_file_that_is_no_model_is_one_line(tmp_path: Path, whole: Path, damage: str) -> None:
    content = whole.read_bytes()
    data = {"halved": content[: len(content) // 2], "truncated": content[:-5000], "empty": b""}
    data["text"] = b"no model\n" * 200
    path = tmp_path / "a.tflite"
    if damage in data:
        path.write_bytes(data[damage])
    with pytest.raises(QawareError, match=r"^a\.tflite: LiteRT cannot load it: ") as caught:
        EXPORTER.open(path, SIGNATURE)
    assert str(caught.value).isprintable()


@needs_litert
def test_errors_while_running_and_other_signatures_are_one_line(whole: Path) -> None:
    with pytest.raises(QawareError, match="LiteRT cannot run it: "):
        EXPORTER.open(whole, SIGNATURE)(torch.zeros(1, 3))
    two = Signature((*SIGNATURE.inputs, TensorSpec("more", "float32", (1,))), SIGNATURE.symbols)
    with pytest.raises(QawareError, match="takes 1 inputs, its signature has 2"):
        EXPORTER.open(whole, two)
