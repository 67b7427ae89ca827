"""CausalLM in real Trainers on a tiny Llama, and the real stories260K checkpoint where it is at hand."""

from __future__ import annotations

import copy
import math
import pickle
import shutil
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.core.module import _jit_is_scripting
from torch.utils.data import DataLoader

from qaware.errors import QawareError
from qaware.lm import CausalLM, TextDataModule

from .tiny_llama import GPT2, LLAMA, MISTRAL, make, saved, tokens

DATA = Path(__file__).parents[2].parent / "shared" / "data"


def loader(rows: int = 8) -> DataLoader[Any]:
    return DataLoader([{"input_ids": row} for row in tokens(rows)], batch_size=4)


def trainer(folder: Path, **options: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(
        **({"default_root_dir": folder, "accelerator": "cpu", "max_epochs": 1} | quiet | options)
    )


def test_a_trainer_fits_validates_tests_and_predicts(tmp_path: Path) -> None:
    module = make(lr=0.01)
    run = trainer(tmp_path, max_epochs=3)
    before = run.validate(module, loader(), verbose=False)[0]["val_loss"]
    run.fit(module, loader(), loader())
    best = run.callback_metrics["val_loss"].item()
    assert best < before
    assert run.callback_metrics["train_loss"].isfinite()
    after = run.test(module, loader(), verbose=False)[0]["test_loss"]
    assert after == pytest.approx(best, abs=1e-6)
    predicted = run.predict(module, loader())
    assert predicted is not None
    with torch.no_grad():
        assert torch.equal(torch.cat(predicted), module.eval()(tokens(8)).argmax(-1))  # type: ignore[arg-type]


def test_the_loss_leaves_out_ignored_labels() -> None:
    module = make()
    ids, labels = tokens(), tokens().clone()
    labels[0, 5:] = -100
    logits = module(ids)[:, :-1]
    kept = labels[:, 1:] != -100
    expected = F.cross_entropy(logits[kept], ids[:, 1:][kept])
    torch.testing.assert_close(module._loss({"input_ids": ids, "labels": labels})[0], expected)


def test_validation_is_the_mean_over_tokens_of_unequal_batches(tmp_path: Path) -> None:
    module = make().eval()
    batches = [{"input_ids": tokens(2, 12)}, {"input_ids": tokens(1, 4)}]
    run = trainer(tmp_path)
    found = run.validate(module, DataLoader(batches, batch_size=None), verbose=False)[0]["val_loss"]
    with torch.no_grad():
        losses = [module._loss(batch)[0].item() for batch in batches]
    assert found == pytest.approx((losses[0] * 22 + losses[1] * 3) / 25, abs=1e-5)


def test_decay_and_warmup() -> None:
    module = make(lr=0.5, weight_decay=0.1, warmup_steps=4, betas=(0.8, 0.9))
    both = module.configure_optimizers()
    optimizer, warmup = both["optimizer"], both["lr_scheduler"]["scheduler"]
    decayed, plain = optimizer.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"], plain["betas"]) == (0.1, 0.0, (0.8, 0.9))
    assert {p.dim() for p in plain["params"]} == {1}
    rates = []
    for _ in range(6):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        warmup.step()
    assert rates == [0.125, 0.25, 0.375, 0.5, 0.5, 0.5]
    assert isinstance(make().configure_optimizers(), torch.optim.AdamW)


@pytest.mark.parametrize(
    "config", [LLAMA, GPT2, {**MISTRAL, "sliding_window": 24}], ids=lambda c: c["model_type"]
)
def test_the_explicit_mask_computes_the_same_logits(config: dict[str, Any]) -> None:
    module = make(config).eval()
    with torch.no_grad():
        torch.testing.assert_close(module._exportable(tokens()), module(tokens()), atol=1e-6, rtol=1e-6)


def test_torch_export_of_any_length_takes_the_mask() -> None:
    module = make().eval()
    open_length = ({1: torch.export.Dim("length", min=2, max=24)},)
    program = torch.export.export(module, (tokens(),), dynamic_shapes=open_length)
    for length in (2, 7, 24):
        ids = tokens(2, length)
        torch.testing.assert_close(program.module()(ids), module(ids), atol=1e-6, rtol=1e-6)
    names = [str(node.target) for node in program.graph.nodes]
    assert any("where" in name for name in names)


def test_tracing_takes_the_mask() -> None:
    module = make().eval()
    # torch.jit reads every property, and Lightning's `trainer` raises outside this context.
    with _jit_is_scripting(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(module, (tokens(),), check_trace=False)
    assert "where" in str(traced.inlined_graph)
    torch.testing.assert_close(traced(tokens(1, 5)), module(tokens(1, 5)), atol=1e-6, rtol=1e-6)


def test_a_window_that_applies_is_refused_at_export() -> None:
    module = make(MISTRAL).eval()
    module(tokens())  # plain attention knows its window
    with pytest.raises(QawareError, match="'sliding_attention' layers of 'mistral' see 8 of 12 tokens"):
        torch.export.export(module, (tokens(),))
    torch.export.export(module, (tokens(2, 8),))  # here it does not
    mixed = {**LLAMA, "model_type": "gemma2", "head_dim": 4, "sliding_window": 8}
    with pytest.raises(QawareError, match="see 8 of 12"):
        make(mixed)._exportable(tokens())


def test_a_model_without_positions_is_refused_at_export() -> None:
    module = CausalLM({"model_type": "bloom", "hidden_size": 16, "n_layer": 1, "n_head": 2, "vocab_size": 32})
    assert module.context_length is None
    assert make(GPT2).context_length == 24
    with pytest.raises(QawareError, match="'bloom' takes no position_ids"):
        module._exportable(tokens())


def test_a_local_folder_is_loaded_for_training(tmp_path: Path) -> None:
    module = CausalLM(saved(tmp_path))
    assert all(part.training for part in module.modules())


class _Data(pl.LightningDataModule):
    def __init__(self, vocab_size: int, block_size: int) -> None:
        super().__init__()
        self.vocab_size, self.block_size = vocab_size, block_size

    def train_dataloader(self) -> DataLoader[Any]:
        return loader()


def test_data_that_does_not_fit_is_refused_before_training(tmp_path: Path) -> None:
    run = trainer(tmp_path, enable_checkpointing=False)
    with pytest.raises(QawareError, match="tokenizer has 33 tokens but the model only 32"):
        run.fit(make(), datamodule=_Data(33, 8))
    with pytest.raises(QawareError, match="block_size: 25 is more than the model's context of 24"):
        run.fit(make(), datamodule=_Data(32, 25))
    run.fit(make(), datamodule=_Data(32, 24))


def test_copies_keep_tied_embeddings() -> None:
    module = make()
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert other.model.lm_head.weight is other.model.model.embed_tokens.weight
        assert torch.equal(other(tokens()), module(tokens()))


@pytest.mark.parametrize("from_folder", [False, True])
def test_a_checkpoint_loads_without_its_folder(tmp_path: Path, from_folder: bool) -> None:
    folder = tmp_path / "weights"
    module = CausalLM(saved(folder), lr=0.02) if from_folder else make(lr=0.02)
    run = trainer(tmp_path, max_steps=2)
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "model.ckpt")
    shutil.rmtree(folder, ignore_errors=True)
    other = CausalLM.load_from_checkpoint(tmp_path / "model.ckpt", map_location="cpu", weights_only=True)
    assert (other.lr, other.betas) == (0.02, (0.9, 0.95))
    assert torch.equal(other.eval()(tokens()), module.eval()(tokens()))
    assert module.hparams["model"] == (str(folder) if from_folder else LLAMA)


@pytest.mark.skipif(not DATA.exists(), reason="the shared real material is not here")
def test_stories260k_scores_as_measured(tmp_path: Path) -> None:
    (tmp_path / "few.txt").write_text("Once upon a time.<|endoftext|>The cat sat.<|endoftext|>The end.")
    folder = str(DATA / "lm" / "stories260K" / "hf")
    data = TextDataModule(
        str(tmp_path / "few.txt"),
        tokenizer=folder,
        val_source=str(DATA / "text" / "tinystories_dev.txt"),
        separator="<|endoftext|>",
        layout="documents",
        block_size=512,
        max_val_windows=200,
        cache_dir=str(tmp_path),
    )
    module = CausalLM(folder).eval()
    windows = data.windows()
    module.check_tokens(data.vocab_size)
    with torch.no_grad():
        nats = sum(
            F.cross_entropy(module(ids[None])[0, :-1], ids[1:], reduction="sum").item() for ids in windows.ids
        )
    assert windows.tokens == 79_255
    assert math.exp(nats / windows.tokens) == pytest.approx(4.384, abs=0.0005)


def test_the_learning_rate_falls_to_zero_along_a_cosine() -> None:
    module = make(warmup_steps=2, cosine=True)
    shares = [module._share(step, 8.0) for step in range(9)]
    assert shares[0] == 0.5  # warming up
    assert shares[4] == pytest.approx(0.5)
    assert shares[8] == pytest.approx(0.0)
    assert shares[2:] == sorted(shares[2:], reverse=True)
