"""The cheap estimate of what a layer costs: from gradients of the float model, without running it quantized.

Half the sum of squared rounding errors, each times the second derivative of the loss (LeCun, Denker and Solla
1989, "Optimal Brain Damage"; Dong et al. 2020, "HAWQ-V2", arXiv:1911.03852). For the second derivative stands
the empirical Fisher information, the mean of squared gradients (Zandonati et al. 2022, "FIT: A Metric for
Model Sensitivity", arXiv:2210.08502).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qaware.engines.weight_fake_quant import weight_fake_quantizer
from qaware.errors import QawareError
from qaware.mixed.weights import Schemes, StoredWeight
from qaware.tasks import ClassificationTask, LanguageTask, Task


class Estimates:
    """Squared gradients of the weights of a float model, and what follows from them."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        weights: Sequence[StoredWeight],
        on_step: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            model: float; not changed.
            task: each of its windows or batches is run forwards and backwards once.
            weights: of which gradients are kept, as many numbers as the weights have.
            on_step: is called after each window or batch.

        Raises:
            QawareError: the task has no labels, or a weight no gradient.
        """
        modules = dict(model.named_modules())
        self._weights = {w.names: _parameter(modules[w.names[0]]) for w in weights}
        self._fisher = {names: torch.zeros_like(p, dtype=torch.float32) for names, p in self._weights.items()}
        count = 0
        with _trainable(self._weights.values()), torch.inference_mode(False), torch.enable_grad():
            for loss, size in _losses(model.eval(), task):
                self._add(loss)
                count += size
                on_step()
        for squares in self._fisher.values():
            squares /= count

    def cost(self, weight: StoredWeight, schemes: Schemes) -> float:
        """Nats for each token or sample that rounding ``weight`` to nearest costs. What the rounding of its
        input costs is not in it."""
        rows = self._weights[weight.names].detach().float().flatten(1)
        error = weight_fake_quantizer(schemes[0].weight)(rows) - rows
        return float((self._fisher[weight.names].flatten(1) * error.detach().square()).sum()) / 2

    def _add(self, loss: Tensor) -> None:
        grads = torch.autograd.grad(loss, list(self._weights.values()), allow_unused=True)
        for (names, squares), grad in zip(self._fisher.items(), grads, strict=True):
            if grad is None:
                raise QawareError(
                    f"{names[0]}: the loss has no gradient with respect to it, so it cannot be estimated; "
                    "use --method exact, or keep it float in the recipe"
                )
            squares += grad.detach().float().square()


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Spearman's: the correlation of the ranks, equal values sharing theirs. None with fewer than two values,
    or where all of one side are equal."""
    x, y = _ranks(a), _ranks(b)
    mean = (len(x) - 1) / 2
    covariance = math.fsum((i - mean) * (j - mean) for i, j in zip(x, y, strict=True))
    spread = math.fsum((i - mean) ** 2 for i in x) * math.fsum((j - mean) ** 2 for j in y)
    return covariance / math.sqrt(spread) if spread else None


def _ranks(values: Sequence[float]) -> list[float]:
    return [sum(v < x for v in values) + (sum(v == x for v in values) - 1) / 2 for x in values]


def _parameter(module: Any) -> nn.Parameter:
    """The trained weight, also where torch.nn.utils.prune masks it."""
    own: dict[str, nn.Parameter] = module._parameters
    return own["weight"] if "weight" in own else own["weight_orig"]


class _trainable:
    """Inside, these parameters have gradients."""

    def __init__(self, parameters: Any) -> None:
        self._kept = [(p, p.requires_grad) for p in parameters]

    def __enter__(self) -> None:
        for parameter, _ in self._kept:
            parameter.requires_grad_(True)

    def __exit__(self, *_: object) -> None:
        for parameter, wanted in self._kept:
            parameter.requires_grad_(wanted)


def _losses(model: nn.Module, task: Task) -> Iterator[tuple[Tensor, int]]:
    """For each window or batch the sum of its losses in nats, and how many they are."""
    wrapped = task.signature.wrap(model).eval()
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if isinstance(task, LanguageTask):
        for ids, first in zip(task.windows.ids, task.windows.first, strict=True):
            logits = wrapped(ids.unsqueeze(0).to(device))[0, first - 1 : -1]
            yield F.cross_entropy(logits.float(), ids[first:].to(device), reduction="sum"), len(ids) - first
    elif isinstance(task, ClassificationTask):
        for inputs, labels in zip(task.inputs, task.labels, strict=True):
            logits = wrapped(*(t.to(device) for t in inputs))
            yield F.cross_entropy(logits.float(), labels.to(device), reduction="sum"), len(labels)
    else:
        raise QawareError("data: has neither tokens nor labels, so there is no loss to take gradients of")
