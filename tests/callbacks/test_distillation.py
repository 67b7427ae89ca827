"""Distillation inside real Trainers: the loss, the teacher, a resume, and what is refused."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lit import VOCAB, Body, Counting, LitClassifier, LitLM, Sgd, images, loader, trainer
from resumable_loader import Resumable
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from qaware import QawareError, QuantizationAwareTraining
from qaware.callbacks.distillation import Distillation, float_copy, kl_rows
from qaware.callbacks.prepared import prepare
from qaware.engines.fake_quant import set_fake_quant

INT2 = {"name": "int2", "rules": [{"name": "*", "scheme": {"bits": 2}}]}
STATIC = {"rules": [{"type": "Linear", "scheme": {"bits": 3, "activation": "int8-static"}}]}


def qat(distillation: float, recipe: Any = INT2, **options: Any) -> QuantizationAwareTraining:
    options = {"score": False, "convert": False, **options}
    return QuantizationAwareTraining(recipe, distillation=distillation, **options)


def make(cls: type[Any] = LitLM, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return cls()


def trained() -> LitLM:
    """A float model that has learned its task, so that its outputs are worth keeping."""
    model = make()
    trainer(max_epochs=8).fit(model, loader())
    model.losses.clear()
    return model


class Steps(pl.Callback):
    """The loss that the Trainer got and the divergence that was logged, a pair for each step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.kl: list[float | None] = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, output: Any, *_: Any
    ) -> None:
        self.losses.append(output["loss"].item())
        logged = trainer.callback_metrics.get("qaware/kl")
        self.kl.append(None if logged is None else logged.item())


def divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """Written as in a textbook, in float64, one value a row."""
    p, q = reference.double().softmax(-1), logits.double().softmax(-1)
    return (p * (p / q).log()).sum(-1)


def gap(model: LitLM, reference: nn.Module) -> float:
    """How far the rounding model is from the float one on other data, in nats."""
    ids = Counting(9).ids
    set_fake_quant(model, True)
    with torch.no_grad():
        return divergence(reference(ids=ids)["logits"], model.eval()(ids=ids)["logits"]).mean().item()


def test_pure_distillation_brings_the_outputs_back_to_those_of_the_float_model() -> None:
    gaps = {}
    for share in (0.0, 1.0):
        model, steps = trained(), Steps()
        reference = float_copy(model, None)
        callbacks = [qat(share), steps] if share else [qat(share)]
        trainer(max_epochs=15, callbacks=callbacks).fit(model, loader())
        gaps[share] = gap(model, reference)
    assert steps.kl[0] > 0.1, "two bits cost something"
    assert steps.kl[-1] < 0.1 * steps.kl[0]
    assert steps.losses == pytest.approx(steps.kl, rel=1e-6)
    assert gaps[1.0] < 0.5 * gaps[0.0]


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_the_loss_of_a_step_is_the_formula(share: float) -> None:
    model, steps = make(), Steps()
    quantized = prepare(make(), INT2)
    batch = next(iter(loader()))
    trainer(max_steps=1, callbacks=[qat(share), steps]).fit(model, loader())
    kl = divergence(make()(**batch)["logits"], quantized(**batch)["logits"]).mean().item()
    assert kl > 1e-3
    assert steps.kl == [pytest.approx(kl, rel=1e-4)]
    assert model.losses == [pytest.approx(quantized.loss(batch).item(), rel=1e-6)], "yours stays yours"
    assert steps.losses == [pytest.approx((1 - share) * model.losses[0] + share * kl, rel=1e-5)]


def test_the_gradient_is_that_of_the_formula() -> None:
    """One step of plain gradient descent by hand."""
    model, by_hand, reference = make(Sgd), prepare(make(Sgd), INT2), make(Sgd)
    batch = next(iter(loader()))
    trainer(max_steps=1, callbacks=[qat(0.5)]).fit(model, loader())
    kl = divergence(reference(**batch)["logits"].detach(), by_hand(**batch)["logits"]).mean()
    (0.5 * by_hand.loss(batch) + 0.5 * kl).backward()
    for name, parameter in by_hand.named_parameters():
        expected = parameter - parameter.grad
        torch.testing.assert_close(model.get_parameter(name), expected, rtol=1e-4, atol=1e-6)


class Masked(LitLM):
    """Padding at the end; the target is called twice in a step."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Padded()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Any]:
        mask = torch.ones_like(batch["ids"])
        mask[:, 10:] = 0
        first = self.body(batch["ids"][:5], attention_mask=mask[:5])
        self.body(batch["ids"][5:], attention_mask=mask[5:])
        with torch.no_grad():
            self.body(batch["ids"])
        return {"loss": F.cross_entropy(first[:, 0], batch["ids"][:5, 1]), "extra": "kept"}


class Padded(Body):
    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return super().forward(ids=ids)["logits"]


def test_padding_is_left_out_and_calls_are_added_up() -> None:
    model, steps = make(Masked), Steps()
    quantized, ids = prepare(make(Masked), INT2, "body"), next(iter(loader()))["ids"]
    outputs: list[Any] = []

    class Outputs(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, output: Any, *_: Any) -> None:
            outputs.append(output)

    trainer(max_steps=1, callbacks=[qat(1.0, target="body"), steps, Outputs()]).fit(model, loader())
    rows = divergence(make(Masked).body(ids), quantized.body(ids))[:, :10]
    assert steps.kl == [pytest.approx(rows.mean().item(), rel=1e-4)]
    assert outputs[0]["extra"] == "kept"


def test_an_output_object_of_transformers_gives_its_logits() -> None:
    @dataclass
    class Output:
        loss: Tensor
        logits: Tensor

    class Wrapped(LitLM):
        def forward(self, *, ids: Tensor) -> Any:
            logits = super().forward(ids=ids)["logits"]
            return Output(logits.mean(), logits)

        def loss(self, batch: dict[str, Tensor]) -> Tensor:
            return self(ids=batch["ids"]).logits.square().mean()

    steps = Steps()
    trainer(max_steps=1, callbacks=[qat(1.0), steps]).fit(make(Wrapped), loader())
    assert steps.kl[0] > 1e-3


def test_the_teacher_is_the_float_model_and_never_changes() -> None:
    model, callback = make(), qat(0.5)
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    seen: list[dict[str, Tensor]] = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            teacher = callback._teacher._teacher
            assert not teacher.training
            assert not any(p.requires_grad for p in teacher.parameters())
            assert not {id(p) for p in teacher.parameters()} & {id(p) for p in module.parameters()}
            seen.append({name: p.clone() for name, p in teacher.named_parameters()})

    run = trainer(callbacks=[callback, Look()])
    run.fit(model, loader())
    assert len(seen) == 12
    for name, parameter in expected.items():
        assert all(torch.equal(step[name], parameter) for step in seen)
        assert not torch.equal(parameter, model.get_parameter(name)), "the student learned"
    in_groups = {id(p) for group in run.optimizers[0].param_groups for p in group["params"]}
    assert in_groups == {id(p) for p in model.parameters()}


def test_checkpoints_hold_the_teacher_in_the_callbacks_state_only(tmp_path: Path) -> None:
    model, keep = make(), ModelCheckpoint(dirpath=tmp_path, save_last=True)
    trainer(callbacks=[qat(0.5), keep], enable_checkpointing=True).fit(model, loader())
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == model.state_dict().keys()
    state = saved["callbacks"]["qaware.QuantizationAwareTraining"]
    assert torch.equal(state["teacher"]["body.up.weight"], make().body.up.weight)
    trainer(callbacks=[qat(0.0), keep], enable_checkpointing=True, max_epochs=1).fit(make(), loader())
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert "teacher" not in saved["callbacks"]["qaware.QuantizationAwareTraining"]


@pytest.mark.parametrize("stop", [3, 4, 6])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="rounding"),
        pytest.param({"start_step": 5}, id="start-step"),
        pytest.param({"recipe": STATIC, "target": "body"}, id="observers"),
    ],
)
def test_a_resume_is_bit_equal(stop: int, options: dict[str, Any], tmp_path: Path) -> None:
    def run(name: str, model: LitLM, path: Path | None = None, **limits: Any) -> tuple[Steps, dict[str, Any]]:
        folder = tmp_path / name
        steps, keep = Steps(), ModelCheckpoint(dirpath=folder, save_last=True, every_n_train_steps=1)
        callbacks = [qat(0.5, **options), steps, keep]
        fitting = trainer(callbacks=callbacks, enable_checkpointing=True, max_epochs=2, **limits)
        fitting.fit(model, Resumable(Counting(0), batch_size=8), ckpt_path=path)
        return steps, torch.load(folder / "last.ckpt", weights_only=True)

    whole, expected = run("whole", make())
    first, _ = run("first", make(), max_steps=stop)
    second, state = run("second", make(seed=77), tmp_path / "first" / "last.ckpt")
    assert (len(first.losses), len(second.losses)) == (stop, 8 - stop)
    assert first.losses + second.losses == whole.losses
    assert first.kl + second.kl == whole.kl
    torch.testing.assert_close(state["state_dict"], expected["state_dict"], rtol=0, atol=0)
    torch.testing.assert_close(state["optimizer_states"], expected["optimizer_states"], rtol=0, atol=0)
    theirs, ours = (c["callbacks"]["qaware.QuantizationAwareTraining"] for c in (expected, state))
    torch.testing.assert_close(ours["teacher"], theirs["teacher"], rtol=0, atol=0)


def test_the_teacher_is_the_float_model_of_start_step() -> None:
    """Until then the model trains in float on its own loss, and what comes of that is the teacher."""
    callback, steps = qat(1.0, start_step=2), Steps()
    trainer(max_epochs=1, callbacks=[callback, steps]).fit(make(), loader())
    assert steps.kl[:2] == [None, None]
    assert min(steps.kl[2:]) > 1e-3
    plain = make()
    trainer(max_steps=2).fit(plain, loader())
    teacher = callback.state_dict()["teacher"]
    assert all(torch.equal(teacher[name], tensor) for name, tensor in plain.state_dict().items())


@pytest.mark.parametrize(
    "options",
    [
        {"accumulate_grad_batches": 2},
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
        {"gradient_clip_val": 0.1},
    ],
)
def test_trains_under_the_trainers_options(options: dict[str, Any]) -> None:
    model, steps = trained(), Steps()
    trainer(max_epochs=10, callbacks=[qat(1.0), steps], **options).fit(model, loader())
    assert sum(steps.kl[-4:]) < 0.6 * sum(steps.kl[:4])


def test_the_distribution_is_computed_in_float32_and_ruled_out_classes_do_not_count() -> None:
    torch.manual_seed(0)
    theirs, mine = (torch.randn(5, 300) * 4 for _ in range(2))
    expected = divergence(theirs.bfloat16(), mine.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(
            kl_rows(theirs.bfloat16(), mine.bfloat16()).double(), expected, rtol=1e-6, atol=0
        )
    ruled_out = torch.full((5, 1), -torch.inf)
    padded = torch.cat([mine, ruled_out], -1).requires_grad_()
    rows = kl_rows(torch.cat([theirs, ruled_out], -1), padded)
    torch.testing.assert_close(rows, kl_rows(theirs, mine))
    rows.sum().backward()
    assert padded.grad is not None
    assert padded.grad.isfinite().all()


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_nothing(reentrant: bool) -> None:
    class Recomputing(LitLM):
        def forward(self, *, ids: Tensor) -> dict[str, Tensor]:
            assert self.body is not None
            x = self.body.embed(ids)
            y: Tensor = checkpoint(self._middle, x, use_reentrant=reentrant)
            return {"logits": self.body.head(x + y)}

        def _middle(self, x: Tensor) -> Tensor:
            assert self.body is not None
            return self.body.down(torch.relu(self.body.up(x)))

    runs = {}
    for cls in (LitLM, Recomputing):
        runs[cls] = Steps()
        trainer(max_epochs=1, callbacks=[qat(0.5), runs[cls]]).fit(make(cls), loader())
    assert runs[Recomputing].losses == runs[LitLM].losses


def test_a_target_inside_of_a_recomputed_part_is_seen_once() -> None:
    class Recomputing(LitLM):
        def forward(self, *, ids: Tensor) -> dict[str, Tensor]:
            assert self.body is not None
            output: dict[str, Tensor] = checkpoint(self.body, ids=ids, use_reentrant=False)
            return output

    runs = {}
    for cls in (LitLM, Recomputing):
        runs[cls] = Steps()
        callbacks = [qat(0.5, target="body"), runs[cls]]
        trainer(max_epochs=1, callbacks=callbacks).fit(make(cls), loader())
    assert runs[Recomputing].losses == runs[LitLM].losses


def test_a_training_step_without_batch_idx_and_one_that_skips_a_batch() -> None:
    class Short(LitLM):
        def training_step(self, batch: dict[str, Tensor]) -> Tensor | None:  # type: ignore[override]
            loss = self.loss(batch)
            self.losses.append(loss.item())
            return None if len(self.losses) == 2 else loss

    model = make(Short)
    trainer(max_epochs=1, callbacks=[qat(1.0)]).fit(model, loader())
    assert len(model.losses) == 4


def test_nothing_is_left_behind() -> None:
    class Failing(LitLM):
        def on_train_batch_end(self, *_: Any) -> None:
            raise KeyError("the user's own mistake")

    for cls in (LitLM, Failing):
        model, callback = make(cls), qat(0.5)
        try:
            trainer(max_epochs=1, callbacks=[callback]).fit(model, loader())
        except KeyError:
            assert cls is Failing
        assert "training_step" not in vars(model)
        assert not any(module._forward_hooks for module in model.modules())
        assert callback._teacher._teacher is None


def test_one_callback_for_two_models_and_for_two_fits() -> None:
    callback = qat(0.5)
    first, second = make(), make(seed=1)
    trainer(max_epochs=1, callbacks=[callback]).fit(first, loader())
    trainer(max_epochs=1, callbacks=[callback]).fit(first, loader())
    weights = callback._teacher.state_dict()["teacher"]
    assert torch.equal(weights["body.up.weight"], make().body.up.weight), "still the float one"
    trainer(max_epochs=1, callbacks=[callback]).fit(second, loader())
    weights = callback._teacher.state_dict()["teacher"]
    assert torch.equal(weights["body.up.weight"], make(seed=1).body.up.weight)


def test_the_divergence_reaches_the_logger(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    trainer(max_epochs=1, callbacks=[qat(0.5)], logger=logger, log_every_n_steps=1).fit(make(), loader())
    header = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()[0]
    assert "qaware/kl" in header.split(",")


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan"), "half"])
def test_a_share_outside_of_0_to_1_is_refused(share: Any) -> None:
    with pytest.raises(QawareError, match=r"^distillation: .* between 0 \(none\) and 1"):
        qat(share)


def test_manual_optimization_is_refused_before_training() -> None:
    class Manual(LitLM):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

    model = make(Manual)
    with pytest.raises(QawareError, match="distillation: Manual optimizes manually"):
        trainer(callbacks=[qat(0.5)]).fit(model, loader())
    assert model.losses == []


def test_a_compiled_lightning_module_is_refused_and_stays_compiled() -> None:
    model = make()
    model.training_step = model.training_step  # what torch.compile(module) does, without compiling
    with pytest.raises(QawareError, match=r"training_step of this LitLM was replaced.*\.compile\(\)"):
        trainer(callbacks=[qat(0.5)]).fit(model, loader())
    assert "training_step" in vars(model)


def test_a_compiled_submodule_works() -> None:
    steps, plain = Steps(), Steps()
    trainer(max_steps=2, callbacks=[qat(0.5), plain]).fit(make(), loader())
    model = make()
    model.body.compile(backend="eager")
    trainer(max_steps=2, callbacks=[qat(0.5, target="body"), steps]).fit(model, loader())
    assert steps.losses == pytest.approx(plain.losses, rel=1e-6)


def test_a_target_that_the_step_does_not_call_is_refused() -> None:
    with pytest.raises(QawareError, match=r"did not call LitClassifier .* give target= the submodule"):
        trainer(callbacks=[qat(0.5, "int8-weight-only")]).fit(make(LitClassifier), images())
    trainer(max_steps=2, callbacks=[qat(0.5, "int8-weight-only", target="net")]).fit(
        make(LitClassifier), images()
    )


@pytest.mark.parametrize(("output", "said"), [("ids", "int64"), ("one", r"float32 of shape \(16, 1\)")])
def test_an_output_that_is_no_distribution_is_refused(output: str, said: str) -> None:
    class Odd(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(32, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.net(x)
            return y.argmax(-1) if output == "ids" else y

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return self(batch[0]).float().mean() + self.net.weight.sum()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    data = DataLoader(TensorDataset(torch.randn(16, 32)), batch_size=16)
    with pytest.raises(QawareError, match=f"distillation: Odd returns torch.{said}.*target="):
        trainer(callbacks=[qat(0.5)]).fit(Odd(), data)


def test_resuming_what_was_trained_without_distillation_is_refused(tmp_path: Path) -> None:
    run = trainer(max_epochs=1, callbacks=[qat(0.0)])
    run.fit(make(), loader())
    run.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(QawareError, match="holds no float model to learn from; resume one"):
        trainer(callbacks=[qat(0.5)]).fit(make(), loader(), ckpt_path=tmp_path / "plain.ckpt")


def test_a_float_checkpoint_gives_the_teacher(tmp_path: Path) -> None:
    model = make()
    run = trainer(max_epochs=1)
    run.fit(model, loader())
    run.save_checkpoint(tmp_path / "float.ckpt")
    callback = qat(0.5)
    trainer(max_epochs=2, callbacks=[callback]).fit(make(seed=5), loader(), ckpt_path=tmp_path / "float.ckpt")
    weights = callback._teacher.state_dict()["teacher"]
    assert torch.equal(weights["body.up.weight"], model.body.up.weight)


def test_the_vocabulary_of_a_row_is_the_last_dimension() -> None:
    assert kl_rows(torch.zeros(2, 3, VOCAB), torch.zeros(2, 3, VOCAB)).shape == (2, 3)
    assert Distillation(1).weight == 1.0
