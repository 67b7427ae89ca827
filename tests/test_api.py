"""qaware.quantize: plain modules, every kind of batch, and what is refused."""

from __future__ import annotations

import copy
from collections import UserDict, namedtuple
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import qaware
from qaware import QawareError
from qaware.engines.base import QuantizedModel
from qaware.engines.static_integer import IntegerLinear

STATIC = {"rules": [{"type": "Linear", "scheme": {"bits": 8, "activation": "int8-static"}}]}
HISTOGRAM = {
    "rules": [{"type": "Linear", "scheme": {"bits": 8, "activation": "int8-static", "observer": "histogram"}}]
}


class Net(nn.Module):
    """Two inputs, one of them optional and one by keyword only."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 4)

    def forward(self, x: Tensor, *, scale: Tensor | float = 1.0) -> Tensor:
        return self.second(torch.relu(self.norm(self.first(x)) * scale))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def batches(count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 8, generator=generator) for _ in range(count)]


def first_range(quantized: QuantizedModel) -> tuple[float, int]:
    found = quantized.activations["first"]
    return found.scale, found.zero_point


def expected_scale(data: list[Tensor]) -> float:
    values = torch.cat(data)
    return (float(values.max()) - float(values.min())) / 255


def test_the_model_stays_as_it_is_and_the_copy_is_quantized() -> None:
    model = net().train()
    before = copy.deepcopy(model.state_dict())
    quantized = qaware.quantize(model, "int8-static", batches())
    assert isinstance(quantized, QuantizedModel)
    assert model.training
    assert type(model.first) is nn.Linear
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not quantized.module.training
    assert type(quantized.module.first) is IntegerLinear
    assert quantized.module.first.weight.dtype == torch.int8
    assert all(
        torch.equal(value, before[key])
        for key, value in quantized.module.state_dict().items()
        if key.startswith("norm.")
    )
    assert first_range(quantized)[0] == pytest.approx(expected_scale(batches()), rel=1e-5)


def test_calibration_is_in_evaluation_mode_and_without_gradients() -> None:
    modes = []

    def step(model: nn.Module, batch: Any) -> None:
        modes.append((model.training, torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
        model(batch)

    with torch.inference_mode():
        quantized = qaware.quantize(net(), "int8-static", batches(2), step=step)
    assert modes == [(False, False, False)] * 3  # once to see where activations are rounded
    assert not any(weight.data.is_inference() for weight in quantized.weights.values())


CLOSE = {"int4": 0.15, "int3": 0.25, "int2": 0.4, "ternary": 0.5}
"""Those of 3 bits and less are for training."""


@pytest.mark.parametrize("recipe", qaware.recipe_names())
def test_every_recipe_stays_close_to_the_float_model(recipe: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()
    data = [torch.randn(32, 64) for _ in range(4)]
    wants_data = "static" in recipe or qaware.Recipe.load(recipe).needs_data
    quantized = qaware.quantize(model, recipe, data if wants_data else None)
    x = torch.cat(data)
    with torch.no_grad():
        error = (quantized.module(x) - model(x)).std() / model(x).std()
    assert 0 < float(error) < next((most for grid, most in CLOSE.items() if grid in recipe), 0.02)


def test_a_histogram_range_is_narrower_and_better_where_there_are_outliers() -> None:
    torch.manual_seed(0)
    exact, data = nn.Sequential(nn.Linear(8, 8)).eval(), [torch.randn(50_000, 8) ** 3]
    whole, cut = (qaware.quantize(exact, recipe, data) for recipe in (STATIC, HISTOGRAM))
    assert cut.activations["0"].scale < whole.activations["0"].scale
    x = torch.cat(data)
    with torch.no_grad():
        errors = [float((q.module(x) - exact(x)).square().mean()) for q in (whole, cut)]
    assert errors[1] < 0.9 * errors[0]


Pair = namedtuple("Pair", ["x", "label"])


@dataclass
class Sample:
    x: Tensor
    label: str


BATCHES = {
    "tensor": lambda x: x,
    "tuple with labels": lambda x: (x, torch.zeros(len(x), dtype=torch.int64)),
    "list of one": lambda x: [x],
    "named tuple": lambda x: Pair(x, "a"),
    "mapping": lambda x: {"x": x, "label": torch.zeros(len(x)), 3: "not a name"},
    "user mapping": lambda x: UserDict(x=x, idx=[1, 2]),
    "dataclass": lambda x: Sample(x, "a"),
}


@pytest.mark.parametrize("kind", BATCHES)
def test_each_kind_of_batch_reaches_forward(kind: str) -> None:
    data = [BATCHES[kind](batch) for batch in batches()]
    assert first_range(qaware.quantize(net(), "int8-static", data)) == first_range(
        qaware.quantize(net(), "int8-static", batches())
    )


def test_keyword_only_arguments_are_taken_from_a_mapping() -> None:
    doubled = qaware.quantize(net(), "int8-static", [{"x": b, "scale": 2.0} for b in batches()])
    plain = qaware.quantize(net(), "int8-static", batches())
    assert doubled.activations["second"].scale > 1.9 * plain.activations["second"].scale


def test_open_signatures_get_everything() -> None:
    seen: list[Any] = []

    class Open(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(8, 2)

        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            seen.append((len(args), sorted(kwargs)))
            return self.first(args[0] if args else kwargs["x"])

    data = [(batches()[0], 1, 2), {"x": batches()[0], "y": 0}, batches()[0]]
    qaware.quantize(Open(), STATIC, data)
    assert seen[1:] == [(3, []), (0, ["x", "y"]), (1, [])]


def test_a_step_takes_any_other_batch() -> None:
    class Custom:
        def __init__(self, x: Tensor) -> None:
            self.x = x

    data = [Custom(batch) for batch in batches()]
    with pytest.raises(QawareError, match=r"type Custom has no obvious way into forward; give step="):
        qaware.quantize(net(), "int8-static", data)
    quantized = qaware.quantize(net(), "int8-static", data, step=lambda model, batch: model(batch.x))
    assert first_range(quantized) == first_range(qaware.quantize(net(), "int8-static", batches()))


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ({"ids": torch.ones(2, 8)}, "type dict with keys ids does not fit forward"),
        ((), "type tuple of 0 does not fit forward"),
        ("text", "type str has no obvious way"),
        (None, "type NoneType has no obvious way"),
    ],
)
def test_a_batch_that_does_not_fit_is_named_with_the_way_out(batch: Any, words: str) -> None:
    with pytest.raises(QawareError, match="give step=") as caught:
        qaware.quantize(net(), "int8-static", [batch])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_only_as_many_batches_as_asked_and_fewer_are_fine() -> None:
    data = batches(6)
    data[3] *= 100
    assert first_range(qaware.quantize(net(), STATIC, data, calibration_batches=3)) == first_range(
        qaware.quantize(net(), STATIC, data[:3])
    )


@pytest.mark.parametrize("recipe", [STATIC, HISTOGRAM])
def test_any_iterable_is_a_loader(recipe: dict[str, Any]) -> None:
    expected = first_range(qaware.quantize(net(), recipe, batches()))
    stacked = TensorDataset(torch.cat(batches()))
    for source in (
        (batch for batch in batches()),
        tuple(batches()),
        DataLoader(stacked, batch_size=16),
        DataLoader(stacked, batch_size=16, shuffle=True),
    ):
        assert first_range(qaware.quantize(net(), recipe, source)) == pytest.approx(expected, rel=1e-6)


def test_a_shuffled_loader_leaves_the_random_state_alone() -> None:
    loader = DataLoader(TensorDataset(torch.cat(batches())), batch_size=16, shuffle=True)
    model = net()
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    qaware.quantize(model, STATIC, loader)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(
    ("calibration", "words"),
    [
        (None, "calibration: recipe 'int8-static' has static activations"),
        ([], "calibration: the loader gave no batch"),
        (7, "calibration: a int is no loader"),
        (torch.ones(2, 8), "calibration: a Tensor is no loader"),
        ({"x": torch.ones(2, 8)}, "calibration: a mapping is one batch"),
        (
            [torch.ones(2, 8), torch.full((2, 8), float("nan"))],
            "calibration: batch 1 (the first is 0) has NaN",
        ),
        ([torch.full((2, 8), float("inf"))], "NaN or infinity (16 of 16 values); repair the data"),
        (
            [torch.ones(2, 8), torch.ones(2, 7)],
            "batch 1 (the first is 0), whose tensors have the shapes (2, 7)",
        ),
        ([torch.ones(2, 8), torch.ones(2, 7)], "where it took (2, 8) (mat1 and mat2 shapes cannot"),
    ],
)
def test_calibration_data_that_cannot_work(calibration: Any, words: str) -> None:
    with pytest.raises(QawareError) as caught:
        qaware.quantize(net(), "int8-static", calibration)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_fewer_batches_than_asked_for_are_an_error_and_fewer_than_the_default_a_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with pytest.raises(QawareError, match=r"calibration_batches: 9 were asked for and the data has 4; give"):
        qaware.quantize(net(), STATIC, batches(), calibration_batches=9)
    with caplog.at_level("INFO"):
        qaware.quantize(net(), STATIC, batches(), calibration_batches=4)
        assert not [line for line in caplog.messages if "batches" in line]
        qaware.quantize(net(), HISTOGRAM, batches())
    assert "qaware: calibrated on 4 batches, all that there are (the default takes 32)" in caplog.messages


def test_a_recipe_without_static_activations_leaves_the_loader_alone() -> None:
    def broken() -> Any:
        raise RuntimeError
        yield

    assert qaware.quantize(net(), "int8-dynamic", broken()).activations == {}


def test_calibration_batches_must_be_positive() -> None:
    with pytest.raises(QawareError, match="calibration_batches: 0 must be at least 1"):
        qaware.quantize(net(), "int8-static", batches(), calibration_batches=0)


def test_what_is_quantized_already_is_refused() -> None:
    quantized = qaware.quantize(net(), "int8-weight-only")
    with pytest.raises(QawareError, match=r"^first: has an integer weight already"):
        qaware.quantize(quantized.module, "int8-weight-only")


def test_a_prepared_module_is_refused() -> None:
    class Lit(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(8, 2)

    with pytest.raises(QawareError, match=r"^first: is prepared for QAT; use qaware\.convert"):
        qaware.quantize(qaware.prepare(Lit(), "int8-dynamic"), "int8-dynamic")


def test_a_trained_lightning_module_goes_without_its_trainer() -> None:
    class Lit(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x)

    model = Lit()
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    model.trainer = trainer
    quantized = qaware.quantize(model, "int8-static", batches())
    assert model.trainer is trainer
    assert quantized.module._trainer is None
    assert first_range(quantized)[0] == pytest.approx(expected_scale(batches()), rel=1e-5)


def test_a_batch_goes_to_the_device_of_the_model() -> None:
    from qaware.api import _move

    meta = torch.device("meta")
    x = torch.ones(2)
    sample = Sample(x, "a")
    moved = _move({"a": [x, (x, 3)], "b": sample, "c": Pair(x, None)}, meta)
    assert (
        moved["a"][0].device == moved["a"][1][0].device == moved["b"].x.device == moved["c"].x.device == meta
    )
    assert (moved["a"][1][1], moved["b"].label, moved["c"].label) == (3, "a", None)
    assert sample.x is x


def test_items_that_may_be_labels_or_arguments_are_not_guessed() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(32, 4)

        def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
            return self.inner(x if scale is None else x * scale)

    batches = [(torch.ones(2, 32), torch.zeros(2, 32))]
    with pytest.raises(QawareError, match=r"labels, or for the optional arguments \(scale\).*give step="):
        qaware.quantize(Scaled(), "int8-static", calibration=batches)
    taken = qaware.quantize(
        Scaled(), "int8-static", calibration=batches, step=lambda model, batch: model(batch[0])
    )
    assert taken.activations["inner"].scale > 0
