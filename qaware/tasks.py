"""What a model is scored on: the data, the metric, and the inputs that the model takes.

A task is made once, from the Trainer's data, and then scores every stage with the same code: the
float model, the prepared and the converted one, and each artifact on its runtime.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from qaware.exporters.signature import Signature, TensorSpec
from qaware.metrics.classification import score_classification
from qaware.metrics.language import score_language
from qaware.metrics.score import Score
from qaware.metrics.windows import Windows

Predict = Callable[..., Tensor]
PARITY_INPUTS = 8


class Task(Protocol):
    """What the pipeline needs of a task."""

    @property
    def signature(self) -> Signature:
        """The inputs of the exported model."""

    @property
    def example(self) -> tuple[Tensor, ...]:
        """One legal set of inputs."""

    @property
    def steps(self) -> int:
        """Calls of ``predict`` in one scoring."""

    @property
    def parity_inputs(self) -> list[tuple[Tensor, ...]]:
        """A few real inputs for the parity check."""

    def score(
        self,
        predict: Predict,
        reference: Predict | None = None,
        *,
        on_step: Callable[[], None] | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> Score | None:
        """Score ``predict``; KL and top-1 agreement when ``reference`` is given."""


@dataclass(frozen=True)
class LanguageTask:
    """Perplexity over fixed windows of token ids."""

    windows: Windows
    signature: Signature
    metrics: Sequence[str] = ()
    """Names of further ``evaluate`` metrics, on the argmax and the target tokens."""

    @property
    def example(self) -> tuple[Tensor, ...]:
        """The longest window, (1, T) int64."""
        return (max(self.windows.ids, key=len).unsqueeze(0),)

    @property
    def steps(self) -> int:
        """One call a window."""
        return len(self.windows.ids)

    @property
    def parity_inputs(self) -> list[tuple[Tensor, ...]]:
        """The first windows, one of them cut short so that a dynamic length is exercised."""
        ids = [w.unsqueeze(0) for w in self.windows.ids[:PARITY_INPUTS]]
        return [(ids[0][:, : max(2, ids[0].shape[1] // 2)],), *((i,) for i in ids)]

    def score(
        self,
        predict: Predict,
        reference: Predict | None = None,
        *,
        on_step: Callable[[], None] | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> Score:
        """See :func:`qaware.metrics.language.score_language`."""
        return score_language(
            predict, self.windows, reference, rank=rank, world=world, on_window=on_step, extra=self.metrics
        )


@dataclass(frozen=True)
class UnscoredTask:
    """Inputs without a metric: enough to export and to check parity."""

    inputs: Sequence[tuple[Tensor, ...]]
    """Positional tensors of each batch, batch axis first."""
    signature: Signature

    @property
    def example(self) -> tuple[Tensor, ...]:
        """Up to two rows of the first batch; one alone would be taken for a fixed size by torch.export."""
        return tuple(t[:2] for t in self.inputs[0])

    @property
    def steps(self) -> int:
        """Nothing is called."""
        return 0

    @property
    def parity_inputs(self) -> list[tuple[Tensor, ...]]:
        """The first batches, and a single row."""
        return [tuple(t[:1] for t in self.inputs[0]), *self.inputs[:PARITY_INPUTS]]

    def score(
        self,
        predict: Predict,
        reference: Predict | None = None,
        *,
        on_step: Callable[[], None] | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> Score | None:
        """None: the outputs are neither logits of tokens nor of labelled classes."""
        return None


@dataclass(frozen=True)
class ClassificationTask(UnscoredTask):
    """Accuracy and cross-entropy over labelled batches."""

    labels: Sequence[Tensor]
    """int64 (B,) for each batch."""
    metrics: Sequence[str] = ()

    @property
    def steps(self) -> int:
        """One call a batch."""
        return len(self.inputs)

    def score(
        self,
        predict: Predict,
        reference: Predict | None = None,
        *,
        on_step: Callable[[], None] | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> Score | None:
        """See :func:`qaware.metrics.classification.score_classification`."""
        return score_classification(
            predict,
            self.inputs,
            self.labels,
            reference,
            rank=rank,
            world=world,
            on_batch=on_step,
            extra=self.metrics,
        )


def language_signature(
    name: str, vocab_size: int | None, longest: int, keyword: str | None = None
) -> Signature:
    """One input of token ids, (1, seq) int64 with ``seq`` from 1 to ``longest``."""
    high = None if vocab_size is None else vocab_size - 1
    spec = TensorSpec(name, "int64", (1, "seq"), None if high is None else 0, high, keyword)
    return Signature((spec,), {"seq": (1, longest)})


def batch_signature(example: Sequence[Tensor], keywords: Sequence[str | None], largest: int) -> Signature:
    """Inputs that share a dynamic batch axis, from 1 to ``largest``."""
    specs = []
    for i, (tensor, keyword) in enumerate(zip(example, keywords, strict=True)):
        dtype = str(tensor.dtype).removeprefix("torch.")
        specs.append(TensorSpec(keyword or f"input{i}", dtype, ("batch", *tensor.shape[1:]), keyword=keyword))
    return Signature(tuple(specs), {"batch": (1, max(largest, 2))})


def with_bounds(signature: Signature, bounds: Sequence[tuple[int, int] | None]) -> Signature:
    """The signature with the legal values of its integer inputs filled in."""
    specs = [
        dataclasses.replace(spec, low=bound[0], high=bound[1]) if bound else spec
        for spec, bound in zip(signature.inputs, bounds, strict=True)
    ]
    return dataclasses.replace(signature, inputs=tuple(specs))
