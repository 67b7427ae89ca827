"""A prepared module is the module that it was: it can be copied, and what is shared stays shared."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from qaware.callbacks.hooks import NAMES

from .data import sequences
from .models import Hoarder, LitLM
from .runs import STATIC, fake_quantized, make, qat, trainer, validate

BODY = {"body.embed", "body.up", "body.down", "body.head"}


def test_case_15_pickle_and_deepcopy_of_a_prepared_module() -> None:
    """Lightning #7551, flash #313: a prepared module is plain objects; copies compute the same and are on
    their own."""
    module = make()
    run = trainer(qat(STATIC, convert=False))
    run.fit(module, sequences(), sequences(9))
    module._trainer = None
    expected = validate(module)
    module._trainer = None
    for other in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert fake_quantized(other) == BODY
        assert validate(other) == expected
        assert not {p.data_ptr() for p in other.parameters()} & {p.data_ptr() for p in module.parameters()}
        more = qat(STATIC)
        trainer(more, max_epochs=1).fit(other, sequences(), sequences(9))
        assert more.result is not None
        assert other.losses[-1] < module.losses[0]
    assert validate(module) == expected


def test_case_15_a_module_in_training_can_be_copied() -> None:
    """Callbacks copy the module while it trains, e.g. to checkpoint or to average it."""

    class Copying(Callback):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            duplicate = copy.deepcopy(pl_module)
            assert fake_quantized(duplicate) == BODY
            # The hooks that QAT puts on the instance belong to the copy, not to the original.
            assert all(getattr(duplicate, name).__self__ is duplicate for name in NAMES)

    trainer(qat(STATIC), Copying()).fit(make(), sequences(), sequences(9))


@pytest.mark.parametrize("score", [True, False])
def test_a_module_that_keeps_tensors_of_the_graph(score: bool) -> None:
    """``self.last = loss`` and a list of losses: the original keeps them, the copy is converted without."""
    module, callback = make(Hoarder), qat(STATIC, score=score)
    trainer(callback).fit(module, sequences(), sequences(9))
    assert callback.result is not None
    assert validate(callback.result.model.module) == validate(module)
    assert module.last.grad_fn is not None
    assert len(module.kept) == 12
    assert module.kept[0].grad_fn is not None


def test_case_31_sharing_ties_hooks_and_subclasses_survive() -> None:
    """torchao's own module swap splits shared layers, drops hooks, and replaces subclasses that compute
    something else (a LoRA layer's output changed by half)."""

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class Shared(LitLM):
        def build(self) -> None:
            super().build()
            self.body.again = self.body.up
            self.body.head.weight = self.body.embed.weight
            self.body.down = Doubled(64, 32)

    calls: list[str] = []
    module, callback = make(Shared), qat(STATIC)
    up, head = module.body.up, module.body.head
    handle = head.register_forward_hook(lambda *_: calls.append("head"))
    trainer(callback).fit(module, sequences(), sequences(9))
    assert module.body.up is up is module.body.again
    assert module.body.head is head
    assert head.weight is module.body.embed.weight
    assert type(module.body.down) is Doubled
    assert len(calls) >= 12
    assert callback.result is not None
    handle.remove()
    converted = callback.result.model.module.body
    assert converted.up is converted.again
    assert type(converted.down) is Doubled
    assert type(converted.down.weight) is nn.Parameter
    assert converted.head.weight.qdata.data_ptr() == converted.embed.weight.qdata.data_ptr()
    assert validate(callback.result.model.module) == validate(module)
