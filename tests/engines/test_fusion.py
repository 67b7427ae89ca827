from __future__ import annotations

import torch
import torch.nn.functional as F
from convnets import Residual, Twins, images
from torch import Tensor, nn

from qaware.engines.dataflow import record
from qaware.engines.fusion import find_layout, outside_stubs
from qaware.layout import LayerSite, Layout
from qaware.matching import CONVOLUTIONS


def layout_of(model: nn.Module, x: Tensor) -> Layout:
    kinds = ("Linear", *CONVOLUTIONS)
    static = {name for name, module in model.named_modules() if type(module).__name__ in kinds}
    return find_layout(record(model, lambda: model(x)), static)


def test_a_residual_network_is_fused_and_joined() -> None:
    layout = layout_of(Residual(), images())
    add1, add2 = "block1.qaware_operations.add_0", "block2.qaware_operations.add_0"
    assert layout.layers == (
        LayerSite("stem.0", "stem.1", True, None),
        LayerSite("block1.conv1", "block1.bn1", True, "stem.0"),
        LayerSite("block1.conv2", "block1.bn2", False, "block1.conv1"),
        LayerSite("block2.conv1", "block2.bn1", True, add1),
        LayerSite("block2.conv2", "block2.bn2", False, "block2.conv1"),
        LayerSite("block2.down.0", "block2.down.1", False, add1),
        LayerSite("depthwise", None, False, add2),
        LayerSite("hidden", None, True, None),  # an average is between two integers
        LayerSite("head", None, False, "hidden"),
    )
    assert [(site.name, site.relu) for site in layout.operations] == [
        (add1, True),
        (add2, True),
        ("qaware_operations.cat_0", False),
    ]
    assert layout.operations[0].place.startswith("forward+")
    assert Layout.from_dict(layout.to_dict()) == layout


class Twice(nn.Module):
    """One layer called twice, and one ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 1)
        self.again = nn.Conv2d(4, 4, 1)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.relu(self.again(self.relu(self.first(x)))))


def test_a_layer_that_is_called_twice_is_not_fused_and_rounds_its_own_input() -> None:
    layout = layout_of(Twice(), images())
    assert layout.layer("first") == LayerSite("first", None, True, None)
    assert layout.layer("again") == LayerSite("again", None, False, None)


def test_a_relu_with_a_ceiling_is_fused_too() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU6(inplace=True), nn.Conv2d(4, 4, 1))
    layout = layout_of(model, images())
    assert layout.layer("0") == LayerSite("0", "1", True, None, 6.0)
    assert layout.layer("3") == LayerSite("3", None, False, "0")


class Branches(nn.Module):
    """A result that is returned, or taken twice, must stay what it is."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.b = nn.Conv2d(4, 4, 1)
        self.norm_b = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.a(x)
        z = self.b(self.norm(y) * y)
        return self.norm_b(z), z


def test_a_norm_is_folded_only_where_it_alone_takes_the_result() -> None:
    layout = layout_of(Branches(), images())
    assert [site.batch_norm for site in layout.layers] == [None, None]


class Untracked(nn.Module):
    """Norms that cannot be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 1)
        self.no_statistics = nn.BatchNorm2d(4, track_running_stats=False)
        self.b = nn.Linear(4, 4)
        self.other_axis = nn.BatchNorm1d(144)

    def forward(self, x: Tensor) -> Tensor:
        x = self.no_statistics(self.a(x)).flatten(2).transpose(1, 2)
        return self.other_axis(self.b(x))


def test_a_norm_without_statistics_or_over_another_axis_stays() -> None:
    layout = layout_of(Untracked(), images())
    assert [site.batch_norm for site in layout.layers] == [None, None]


class Moves(nn.Module):
    """Everything between the two layers only moves values about, but for one branch."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv1d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm1d(4)
        self.pool = nn.MaxPool1d(2)
        self.b = nn.Linear(24, 4)
        self.c = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.pool(self.norm(self.a(x.flatten(2)[:, :, :12]))).flatten(1)
        return self.b(F.dropout(y, training=self.training)) + self.c(torch.sigmoid(y))


def test_integers_pass_what_moves_them_and_nothing_else() -> None:
    layout = layout_of(Moves(), images())
    assert layout.layer("a") == LayerSite("a", "norm", False, None)
    assert layout.layer("b") == LayerSite("b", None, False, "a")
    assert layout.layer("c") == LayerSite("c", None, False, None)


class Stubbed(nn.Module):
    """Written for PyTorch's eager quantization."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 1)
        self.quant = torch.ao.quantization.QuantStub()
        self.conv = nn.Conv2d(4, 4, 1)
        self.join = torch.ao.nn.quantized.FloatFunctional()
        self.dequant = torch.ao.quantization.DeQuantStub()
        self.head = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.quant(self.first(x))
        return self.head(self.dequant(self.join.add_relu(self.conv(x), x)))


def test_the_models_own_stubs_say_what_is_integer() -> None:
    model = Stubbed()
    flow = record(model, lambda: model(images()))
    outside = outside_stubs(flow)
    assert outside is not None
    assert {"first", "head"} <= outside
    assert "conv" not in outside
    layout = find_layout(flow, {"conv"})
    assert [(site.kind, site.relu) for site in layout.operations] == [("add", True)]
    assert outside_stubs(record(Residual(), lambda: None)) is None


def test_an_owner_that_runs_twice_has_its_sites_once() -> None:
    layout = layout_of(Twins(), images())
    assert [site.name for site in layout.operations] == ["block.qaware_operations.add_0"]
    assert layout.operations[0].relu
