"""What a model is scored on is found from the calls of its validation step, and never guessed wrong."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lit import LitLM, loader, trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from qaware import PostTrainingQuantization, QawareError, QuantizationAwareTraining
from qaware.pipeline import QuantizationResult

IDS, CLASSES = 64, 4


class Steps(pl.LightningModule):
    """``call`` runs the model on a batch and returns the loss."""

    def __init__(self, net: nn.Module, call: Any) -> None:
        super().__init__()
        self.net, self.call = net, call

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.net(*args, **kwargs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.call(self.net, batch)

    validation_step = training_step

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def quantize(net: nn.Module, call: Any, batches: list[Any]) -> QuantizationResult:
    torch.manual_seed(0)
    ptq = PostTrainingQuantization("int8-weight-only", target="net")
    data: Any = DataLoader(batches, batch_size=None)
    trainer(callbacks=[ptq]).validate(Steps(net, call), data, verbose=False)
    assert ptq.result is not None
    return ptq.result


def linear(out: int = CLASSES) -> nn.Module:
    return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, out))


def images(*columns: Tensor) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(8, 32, generator=generator), *(c.clone() for c in columns)) for _ in range(3)]


def classify(net: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(net(batch[0]), batch[1])


LABELS = torch.arange(8) % CLASSES


def test_labels_are_told_from_sample_numbers() -> None:
    batches = images(LABELS, torch.arange(100, 108))
    assert quantize(linear(), classify, batches).scores["converted"].accuracy is not None


def test_two_columns_that_may_be_labels_are_said_and_not_scored(caplog: pytest.LogCaptureFixture) -> None:
    result = quantize(linear(), classify, images(LABELS, LABELS.flip(0)))
    assert "columns 1, 2 of a batch may all be labels" in caplog.text
    assert result.scores == {}


def test_a_name_tells_the_labels() -> None:
    batches = [{"x": b[0], "domain": b[2], "labels": b[1]} for b in images(LABELS, LABELS.flip(0))]
    call = lambda net, batch: F.cross_entropy(net(batch["x"]), batch["labels"])  # noqa: E731
    assert quantize(linear(), call, batches).scores["converted"].accuracy is not None


def test_one_logit_is_no_distribution_over_classes() -> None:
    call = lambda net, b: F.binary_cross_entropy_with_logits(net(b[0])[:, 0], b[1] / 4)  # noqa: E731
    assert quantize(linear(1), call, images(LABELS)).scores == {}


class Tagger(nn.Module):
    """Attends both ways."""

    def __init__(self, out: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(IDS, 32), nn.Linear(32, out)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.head(x + x.mean(1, keepdim=True))


@pytest.mark.parametrize("out", [5, IDS])
def test_what_looks_ahead_has_no_perplexity(out: int) -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(0, IDS, (4, 8), generator=generator) for _ in range(2)]
    call = lambda net, ids: net(ids).square().mean()  # noqa: E731
    assert quantize(Tagger(out), call, batches).scores == {}


def test_a_loss_first_or_a_batch_in_one_piece_is_not_scored() -> None:
    class Lossy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = linear()

        def forward(self, x: Any) -> Any:
            logits = self.inner(x if isinstance(x, Tensor) else x["x"])
            return logits.mean(), logits

    call = lambda net, batch: net(batch[0])[0]  # noqa: E731
    assert quantize(Lossy(), call, images(LABELS)).scores == {}
    whole = lambda net, batch: net(batch)[0]  # noqa: E731
    assert quantize(Lossy(), whole, [{"x": b[0]} for b in images(LABELS)]).scores == {}


def test_a_step_that_fails_elsewhere_says_where_it_ran() -> None:
    class Peculiar(LitLM):
        def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            self.trainer.my_own_attribute  # noqa: B018

    run = trainer(callbacks=[QuantizationAwareTraining("int8-dynamic")])
    run.my_own_attribute = True
    with pytest.raises(QawareError, match=r"validation_step: qaware runs it.*score=False"):
        run.fit(Peculiar(), loader(), loader(9))
