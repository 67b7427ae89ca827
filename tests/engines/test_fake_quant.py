"""The switches of fake-quantizers."""

from __future__ import annotations

import torch
from torch import nn

from qaware.engines.activation_fake_quant import StaticFakeQuantizer, TokenFakeQuantizer
from qaware.engines.fake_quant import set_fake_quant
from qaware.engines.weight_fake_quant import weight_fake_quantizer
from qaware.scheme import Scheme


def test_the_switch_reaches_every_kind_and_keeps_observing() -> None:
    static = StaticFakeQuantizer()
    static.observer.observing = True
    static(torch.tensor([-1.0, 1.0]))
    static.observer.observing = False
    model = nn.ModuleList(
        [
            weight_fake_quantizer(Scheme(2)),
            weight_fake_quantizer(Scheme(16)),
            TokenFakeQuantizer(),
            static,
        ]
    )
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    set_fake_quant(model, False)
    assert all(torch.equal(quantizer(x), x) for quantizer in model)
    static.observer.observing = True
    static(x)
    assert float(static.observer.max_val) == float(x.max())
    set_fake_quant(model, True)
    assert not any(torch.equal(quantizer(x), x) for quantizer in model)
