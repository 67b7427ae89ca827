"""Low-bit levels in a compiled library: one file with all of them computes what the converted model does."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest
import registered_levels  # noqa: F401, two sets of levels
import torch
from tiny import SIGNATURE, quantize, tokens
from torch import Tensor

from qaware.engines.base import QuantizedModel
from qaware.exporters import get_exporter
from qaware.exporters.aoti_layers import BlockedWeight
from qaware.exporters.aoti_product import WIDTHS
from qaware.exporters.base import Runner
from qaware.exporters.packed import pack
from qaware.parity import Parity, compare

LOW = {"group_size": 32, "activation": "int8-dynamic", "scale_dtype": "bfloat16"}
LEVELS = {
    "qkv": {**LOW, "bits": 2, "levels": "stretched"},
    "attn_out": {**LOW, "bits": 2, "levels": "ternary"},
    "gate_proj": {**LOW, "bits": 4, "levels": "test-fp4"},
    "down_proj": {**LOW, "bits": 3, "levels": "test-powers"},
    "lm_head": {**LOW, "bits": 3, "levels": "stretched"},
    "embed": {"bits": 1, "group_size": 32, "levels": "stretched"},
}
RECIPE = {"name": "low", "rules": [{"name": name, "scheme": scheme} for name, scheme in LEVELS.items()]}
EXPORTER = get_exporter("aoti")


class Compiled(NamedTuple):
    quantized: QuantizedModel
    path: Path
    run: Runner

    def parity(self, quantized: QuantizedModel) -> Parity:
        reference = SIGNATURE.wrap(EXPORTER.reference(quantized)).eval()
        return compare(self.run, reference, [(tokens(length, length),) for length in (1, 7, 64)])


@pytest.fixture(scope="session")
def low(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    if why := EXPORTER.missing():
        pytest.skip(why)
    quantized = quantize(RECIPE)
    path = tmp_path_factory.mktemp("levels") / "low.pt2"
    EXPORTER.export(quantized, (tokens(8),), SIGNATURE, path)
    return Compiled(quantized, path, EXPORTER.open(path, SIGNATURE))


def test_the_library_computes_what_the_converted_model_does(low: Compiled) -> None:
    low.parity(low.quantized).require("low.pt2", EXPORTER.tolerance_for(low.quantized.plan))


def test_the_gate_sees_a_step_in_one_layer(low: Compiled) -> None:
    """Levels that are read half a step off are another model."""
    other = quantize(RECIPE, seed=0)
    weight = other.module.qkv.weight
    weight.qdata.add_(1)
    assert not low.parity(other).within(EXPORTER.tolerance_for(other.plan))


def constants(path: Path) -> dict[str, Tensor]:
    with zipfile.ZipFile(path) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".so")]
        library = archive.extract(name, path.parent / "unpacked")
    runner = torch._C._aoti.AOTIModelContainerRunnerCpu(library, 1)
    return {k.removeprefix("module."): v.clone() for k, v in runner.extract_constants_map(False).items()}


def test_the_library_holds_the_integers_at_their_width(low: Compiled) -> None:
    held = constants(low.path)
    for name in LEVELS:
        weight = low.quantized.weights[name]
        if weight.scheme.code_bits in WIDTHS and name != "embed":
            assert torch.equal(held[f"{name}.packed.codes"], BlockedWeight(weight).codes)
        else:
            for plane, packed in pack(weight.data, weight.scheme).items():
                assert torch.equal(held[f"{name}.packed.plane{plane}"], packed)
        integers = ("plane", "codes")
        stored = sum(
            t.numel()
            for key, t in held.items()
            if key.startswith(tuple(f"{name}.packed.{i}" for i in integers))
        )
        assert stored == weight.data.numel() * weight.scheme.code_bits / 8
