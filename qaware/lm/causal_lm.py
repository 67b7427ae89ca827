"""A causal language model of `transformers` as a LightningModule: train it, score it, export it."""

from __future__ import annotations

import inspect
import math
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from qaware.errors import QawareError
from qaware.lm.attention import attention
from qaware.lm.batches import IGNORED
from qaware.lm.build import from_config, from_weights, settings
from qaware.lm.key_values import recorded_shapes

MASKED = -1e4
"""What is added to the scores of later tokens at export: 0 after softmax, and finite in float16."""


class CausalLM(pl.LightningModule):
    """Next-token prediction with any causal LM of `transformers`, in float32.

    Args:
        model: a configuration, ``{"model_type": "llama", "hidden_size": 128, ...}``, for random weights; a
            local folder; or, where no such folder exists, a name on the hub. Only safetensors are read and
            no code that comes with a model is run.
        lr: learning rate of AdamW.
        weight_decay: for matrices; vectors (norms, biases) are not decayed.
        warmup_steps: optimizer steps over which the learning rate rises linearly; 0 for none.
        betas: of AdamW.
        cosine: lower the learning rate along half a cosine, to zero at the Trainer's last step.

    Raises:
        QawareError: the configuration has an unknown key or value, or the weights cannot be loaded.
    """

    def __init__(
        self,
        model: str | dict[str, Any],
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        warmup_steps: int = 0,
        betas: tuple[float, float] = (0.9, 0.95),
        cosine: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr, self.weight_decay, self.warmup_steps, self.betas = lr, weight_decay, warmup_steps, betas
        self.cosine = cosine
        self.model: Any = from_config(model) if isinstance(model, dict) else from_weights(model)
        # transformers hands out loaded models in eval mode, and Lightning trains a model as it finds it.
        self.model.train()

    @property
    def vocab_size(self) -> int:
        """Number of token ids that the model has embeddings for."""
        return int(self.model.config.vocab_size)

    @property
    def context_length(self) -> int | None:
        """Most tokens that the model was made to see at once; None where it states no limit."""
        length = getattr(self.model.config, "max_position_embeddings", None)
        return None if length is None else int(length)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits, float (batch, tokens, vocabulary), for int64 ids (batch, tokens)."""
        if torch.compiler.is_exporting() or torch.jit.is_tracing():  # type: ignore[attr-defined]
            return self._exportable(input_ids)
        logits: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return logits

    def _exportable(self, input_ids: Tensor) -> Tensor:
        """The same logits with an explicit float mask, because tract refuses boolean ones."""
        length = input_ids.shape[1]
        # A length that stays open in the graph is a SymInt or a tensor here.
        _check_exportable(self.model, length if type(length) is int else self.context_length)
        at = torch.arange(length, device=input_ids.device)
        return self._masked(input_ids, at, at, use_cache=False)

    def cache_shapes(self, length: int) -> list[tuple[int, int]]:
        """``(heads, dim)`` of the keys and values of each layer, found by running the model on two tokens.

        Args:
            length: tokens of the longest text.

        Raises:
            QawareError: the model keeps something else than keys and values, or its layers see a window.
        """
        _check_exportable(self.model, length)
        return recorded_shapes(self)

    def step(self, input_ids: Tensor, positions: Tensor, cache: Any) -> Tensor:
        """Logits (1, S, V) of the ids (1, S) at ``positions`` (S,), after those that ``cache`` holds."""
        seen = cache.positions(input_ids.shape[1])
        with attention(self.model, getattr(cache, "attend", None)):
            return self._masked(input_ids, positions, seen, past_key_values=cache, use_cache=True)

    def _masked(self, input_ids: Tensor, at: Tensor, seen: Tensor, **options: Any) -> Tensor:
        """Logits of tokens at ``at`` (S,), which see those at ``seen`` (keys,) that are not after them."""
        mask = torch.where(seen[None, :] > at[:, None], MASKED, 0.0)[None, None]
        # That of the norms: an embedding may be stored in float16 and looked up in float32.
        floats = [p.dtype for p in self.model.parameters() if p.dim() == 1 and p.is_floating_point()]
        dtype = floats[0] if floats else mask.dtype
        if dtype != mask.dtype:  # a cast that changes nothing would still end up in the graph
            mask = mask.to(dtype)
        logits: Tensor = self.model(
            input_ids=input_ids, attention_mask=mask, position_ids=at[None], **options
        ).logits
        return logits

    def training_step(self, batch: dict[str, Tensor], batch_idx: int = 0) -> Tensor:
        """Mean loss in nats, a float32 scalar, for ``input_ids`` and optional ``labels`` (batch, tokens)."""
        loss, _ = self._loss(batch)
        self.log("train_loss", loss, prog_bar=True, batch_size=len(batch["input_ids"]))
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int = 0) -> None:
        """Logs ``val_loss``, the mean over tokens in nats."""
        self._log_loss("val_loss", batch)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int = 0) -> None:
        """Logs ``test_loss``, the mean over tokens in nats."""
        self._log_loss("test_loss", batch)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int = 0) -> Tensor:
        """The likeliest next token at each position, int64 (batch, tokens)."""
        logits: Tensor = self(batch["input_ids"])
        return logits.argmax(-1)

    def _log_loss(self, name: str, batch: dict[str, Tensor]) -> None:
        loss, targets = self._loss(batch)
        # Weighted by tokens rather than rows, so that batches of unequal length average to the true mean.
        count = int((targets != IGNORED).sum())
        if count:
            self.log(name, loss, prog_bar=True, sync_dist=True, batch_size=count, on_epoch=True)

    def _loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        targets = batch.get("labels", batch["input_ids"])[:, 1:]
        logits = self(batch["input_ids"])[:, :-1].float()
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
        return loss, targets

    def configure_optimizers(self) -> Any:
        """AdamW, its learning rate set at each step when ``warmup_steps`` or ``cosine`` ask for it."""
        trained = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.dim() > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=self.betas)
        if self.warmup_steps <= 0 and not self.cosine:
            return optimizer
        last = float(self.trainer.estimated_stepping_batches) if self.cosine else math.inf
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self._share(step, last))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _share(self, step: int, last: float) -> float:
        """Of the learning rate, at a step of ``last`` in all."""
        warm = min(1.0, (step + 1) / max(1, self.warmup_steps))
        return warm * (1 + math.cos(math.pi * min(1.0, step / last))) / 2

    def setup(self, stage: str) -> None:
        """Refuse data whose tokens or windows the model cannot take, before anything is trained on it."""
        data: Any = getattr(self.trainer, "datamodule", None)
        if hasattr(data, "vocab_size"):
            self.check_tokens(data.vocab_size)
        block, most = getattr(data, "block_size", 0), self.context_length
        if most is not None and block > most:
            raise QawareError(
                f"block_size: {block} is more than the model's context of {most} tokens; "
                "lower it or raise max_position_embeddings"
            )

    def check_tokens(self, vocab_size: int) -> None:
        """QawareError when a tokenizer of ``vocab_size`` tokens has more of them than the model embeds."""
        if vocab_size > self.vocab_size:
            raise QawareError(
                f"vocab_size: the tokenizer has {vocab_size} tokens but the model only {self.vocab_size}; "
                f"set the model's vocab_size to {vocab_size} or use the model's own tokenizer"
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the configuration instead of the folder or name, so that the checkpoint loads without it."""
        if isinstance(self.hparams["model"], str):
            checkpoint["hyper_parameters"]["model"] = settings(self.model.config)


def _check_exportable(model: Any, length: int | None) -> None:
    """QawareError when one causal mask cannot say what each layer sees; a ``length`` of None is any."""
    config, kind = model.config, model.config.model_type
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise QawareError(f"model: {kind!r} takes no position_ids; export another kind, e.g. llama or gpt2")
    window = getattr(config, "sliding_window", None)
    chunk = getattr(config, "attention_chunk_size", None)
    # What a layer sees, None for everything; a kind of layer that is not here is no plain attention.
    reach = {"full_attention": None, "sliding_attention": window, "chunked_attention": chunk}
    default = "full_attention" if window is None else "sliding_attention"
    for layer in getattr(config, "layer_types", None) or [default]:
        seen = reach.get(layer, 0)
        if seen is not None and (length is None or seen < length):
            raise QawareError(
                f"layer_types: {layer!r} layers of {kind!r} see {seen or 'no fixed number'} of "
                f"{length or 'any'} tokens, which one causal mask cannot say; "
                "export shorter inputs or a model with full attention"
            )
