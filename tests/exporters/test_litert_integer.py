"""Int8 networks on LiteRT: kernels that multiply integers, and the integers of the converted model."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import qaware
from qaware.exporters import get_exporter
from qaware.exporters.litert_flatbuffer import Flatbuffer
from qaware.exporters.signature import Signature, TensorSpec
from qaware.parity import compare

sys.path.insert(0, str(Path(__file__).parent))
import static_net

EXPORTER = get_exporter("litert")
if EXPORTER.missing():
    pytest.skip(str(EXPORTER.missing()), allow_module_level=True)


@pytest.mark.parametrize("per_tensor", [False, True])
def test_an_int8_network_is_the_one_that_was_converted(tmp_path: Path, per_tensor: bool) -> None:
    quantized, path = static_net.static_net(per_tensor), tmp_path / "a.tflite"
    artifact = EXPORTER.export(quantized, (static_net.images(1),), static_net.SIGNATURE, path)
    assert artifact.notes == (
        "integers are multiplied in 6 of 6 layers with static activations, floats in the others",
    )
    assert static_net.steps(EXPORTER.open(path, static_net.SIGNATURE), quantized) == (0.0, 0.0)
    assert EXPORTER.tolerance_for(quantized.plan).steps == 1
    file = Flatbuffer(path.read_bytes())
    stored = _constants(file)
    for name, weight in quantized.weights.items():
        module = quantized.module.get_submodule(name)
        axes = (0,) if module.weight.dim() == 2 else (1, 2, 3, 0) if name == "depthwise" else (0, 2, 3, 1)
        expected = module.weight.permute(*axes) if len(axes) > 1 else module.weight
        integers, scale = stored[name]
        assert np.array_equal(integers, expected.reshape(-1).numpy())
        assert np.array_equal(scale, weight.scale.reshape(-1).numpy())


def _constants(file: Flatbuffer) -> dict[str, Any]:
    (graph,) = file.model.subgraphs
    return {
        tensor.name.decode().removesuffix(".weight"): (
            np.frombuffer(bytes(file.model.buffers[tensor.buffer].data), np.int8),
            np.array(tensor.quantization.scale, np.float32),
        )
        for tensor in graph.tensors
        if tensor.name and tensor.name.endswith(b".weight")
    }


def test_products_and_what_is_between_them_are_on_integers(tmp_path: Path) -> None:
    path = tmp_path / "a.tflite"
    EXPORTER.export(static_net.static_net(), (static_net.images(1),), static_net.SIGNATURE, path)
    file = Flatbuffer(path.read_bytes())
    (graph,) = file.model.subgraphs
    kinds = [(file.operator(op), graph.tensors[op.inputs[0]].type) for op in graph.operators]
    floats = Counter(name for name, kind in kinds if kind == file.schema.TensorType.FLOAT32)
    assert set(floats) == {"TRANSPOSE", "QUANTIZE", "ADD", "MEAN"}


def test_a_graph_made_for_another_runtime(tmp_path: Path) -> None:
    if get_exporter("executorch").missing():
        pytest.skip(str(get_exporter("executorch").missing()))
    model, batches = static_net.StaticNet().eval(), [static_net.images(2, seed) for seed in range(2)]
    quantized = qaware.quantize(model, "int8-static", batches, runtimes=["executorch"], engine="graph")
    path = tmp_path / "a.tflite"
    artifact = EXPORTER.export(quantized, (static_net.images(1),), static_net.SIGNATURE, path)
    assert artifact.details == {"integer_products": 6}
    reference = static_net.SIGNATURE.wrap(EXPORTER.reference(quantized)).eval()
    inputs = [(static_net.images(n, n),) for n in static_net.BATCHES]
    parity = compare(EXPORTER.open(path, static_net.SIGNATURE), reference, inputs, quantized.outputs.values())
    assert parity.within(EXPORTER.tolerance_for(quantized.plan))


def test_layers_of_three_kinds_in_one_network(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.Flatten())
    model.extend([nn.Linear(288, 32), nn.ReLU(), nn.Linear(32, 10)])
    rules = [
        {"name": "0", "scheme": {"bits": 8, "activation": "int8-static"}},
        {"name": "2", "scheme": {"bits": 4}},
        {"name": "4", "scheme": {"bits": 4, "activation": "int8-static"}},
        {"name": "6", "scheme": {"bits": 8, "activation": "int8-dynamic"}},
    ]
    batches = [static_net.images(2, seed) for seed in range(2)]
    quantized = qaware.quantize(model.eval(), {"name": "mixed", "rules": rules}, batches, runtimes=["litert"])
    signature = Signature((TensorSpec("x", "float32", ("n", 3, 16, 16)),), {"n": (1, 4)})
    path = tmp_path / "a.tflite"
    artifact = EXPORTER.export(quantized, (static_net.images(1),), signature, path)
    assert artifact.details == {"integer_products": 2}
    reference = signature.wrap(EXPORTER.reference(quantized)).eval()
    parity = compare(EXPORTER.open(path, signature), reference, [(static_net.images(3, 5),)])
    assert parity.relative < 0.01
