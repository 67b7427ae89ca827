"""LoRA adapters trained by QuantizationAwareTraining inside real Trainers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lit import LENGTH, VOCAB, loader, trainer
from torch import Tensor
from torch.nn import functional as F
from torchao.quantization import IntxUnpackedToInt8Tensor

from qaware import PostTrainingQuantization, QawareError, QuantizationAwareTraining

peft = pytest.importorskip("peft")

RECIPE = "int8-dynamic-int4-weight"
TARGETS = ["q_proj", "v_proj", "down_proj", "lm_head"]


class LitLora(pl.LightningModule):
    """A tiny Llama under peft; the optimizer gets what peft leaves trainable."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": VOCAB}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": LENGTH}
        torch.manual_seed(0)
        llama = LlamaForCausalLM(LlamaConfig(**sizes, **heads))
        config = peft.LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM", **options)
        self.model = peft.get_peft_model(llama, config)
        self.losses: list[float] = []

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return logits

    def _loss(self, batch: dict[str, Tensor]) -> Tensor:
        logits = self(batch["ids"])
        return F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), batch["ids"][:, 1:].reshape(-1))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self._loss(batch)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self._loss(batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def split(model: LitLora) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Copies of the adapters and of the base parameters."""
    state = {n: p.detach().clone() for n, p in model.named_parameters()}
    adapters = {n: p for n, p in state.items() if "lora_" in n}
    return adapters, {n: p for n, p in state.items() if n not in adapters}


def fit(model: LitLora, callback: Any, *others: Any, ckpt_path: Any = None, **options: Any) -> pl.Trainer:
    torch.manual_seed(0)
    runner = trainer(callbacks=[callback, *others], **options)
    runner.fit(model, loader(), loader(9), ckpt_path=ckpt_path)
    return runner


def _float(callback: Any) -> Any:
    assert callback.ledger is not None
    return callback.ledger.scores[("float", "float")]


def test_adapters_train_and_the_base_grid_ships(tmp_path: Path) -> None:
    model = LitLora()
    adapters, base = split(model)
    qat = QuantizationAwareTraining(RECIPE, output_dir=tmp_path)
    runner = fit(model, qat)
    after, base_after = split(model)
    assert all(torch.equal(base[n], base_after[n]) for n in base)
    assert all(not torch.equal(adapters[n], after[n]) for n in adapters)
    trained = {id(p) for group in runner.optimizers[0].param_groups for p in group["params"]}
    assert trained == {id(p) for n, p in model.named_parameters() if "lora_" in n}
    assert model.losses[-1] < model.losses[0]

    result = qat.result
    assert result is not None
    assert result.scores["converted"].losses == result.scores["prepared"].losses
    assert result.scores["converted"].losses != _float(qat).losses
    assert not [n for n, m in result.model.module.named_modules() if "peft" in type(m).__module__]
    head = result.model.module.model.lm_head
    assert isinstance(head.weight, IntxUnpackedToInt8Tensor)
    _in_grid(model, result.model.weights["model.lm_head"])
    assert result.plan.quantized.keys() == result.model.weights.keys()


def _in_grid(model: LitLora, weight: Any) -> None:
    """Its scales are those of the float base weight, and its integers those of the sum."""
    layer = model.model.base_model.model.lm_head
    assert torch.equal(layer.base_layer.weight_fake_quantizer.scale.float(), weight.scale)
    largest = layer.base_layer.weight.detach().view(VOCAB, -1, 32).abs().amax(-1)
    torch.testing.assert_close(weight.scale, (largest / 7.5).bfloat16().float(), rtol=1e-2, atol=0)
    total = (layer.base_layer.weight + layer.delta()).detach().view(VOCAB, -1, 32)
    wanted = (total / weight.scale.unsqueeze(-1)).round().clamp(-8, 7).view(VOCAB, -1)
    assert float((weight.data != wanted).float().mean()) < 0.01  # a bfloat16 scale divides in its precision


def test_the_module_stays_prepared_and_fits_again() -> None:
    model = LitLora()
    qat = QuantizationAwareTraining(RECIPE, score=False)
    fit(model, qat, max_epochs=1)
    keys, steps = list(model.state_dict()), len(model.losses)
    assert isinstance(model.model, peft.PeftModel)
    first = qat.result
    fit(model, qat, max_epochs=1)
    assert len(model.losses) == 2 * steps
    assert list(model.state_dict()) == keys
    assert first is not None
    assert qat.result is not None
    one, two = (r.model.weights["model.lm_head"].data for r in (first, qat.result))
    assert not torch.equal(one, two)


def test_a_checkpoint_continues_where_it_was(tmp_path: Path) -> None:
    whole = LitLora()
    fit(whole, QuantizationAwareTraining(RECIPE, score=False, start_step=3))
    fit(
        LitLora(),
        QuantizationAwareTraining(RECIPE, score=False, start_step=3),
        ModelCheckpoint(tmp_path, "half", save_on_train_epoch_end=True),
        max_epochs=1,
        enable_checkpointing=True,
    )
    resumed = LitLora()
    qat = QuantizationAwareTraining(RECIPE, score=False, start_step=3)
    fit(resumed, qat, ckpt_path=tmp_path / "half.ckpt")
    assert resumed.losses == whole.losses[4:]
    state = whole.state_dict()
    assert all(torch.equal(state[k], v) for k, v in resumed.state_dict().items())


def test_a_target_under_peft() -> None:
    model = LitLora()
    qat = QuantizationAwareTraining(RECIPE, target="model")
    fit(model, qat, max_epochs=1)
    assert qat.result is not None
    assert type(qat.result.model.module).__name__ == "LlamaForCausalLM"
    assert "model.layers.0.self_attn.q_proj" in qat.result.model.weights
    assert qat.result.scores["converted"].losses == qat.result.scores["prepared"].losses


def test_dropout_is_refused_before_training() -> None:
    model = LitLora(lora_dropout=0.1)
    with pytest.raises(QawareError, match=r"q_proj\.base_layer: lora_dropout is 0\.1"):
        fit(model, QuantizationAwareTraining(RECIPE))
    assert model.losses == []


def test_adapters_trained_in_float_are_quantized_after_training() -> None:
    model = LitLora(lora_dropout=0.1)
    ptq = PostTrainingQuantization("int8-dynamic")
    fit(model, ptq, max_epochs=1)
    assert ptq.result is not None
    assert ptq.result.scores["converted"].perplexity < 2 * _float(ptq).perplexity
    assert isinstance(model.model, peft.PeftModel)
    assert not [n for n, _ in model.named_modules() if "fake_quantizer" in n]
