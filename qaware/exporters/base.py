"""What every exporter is: it refuses what its runtime cannot hold, writes a file or folder, and loads it."""

from __future__ import annotations

import abc
import copy
import dataclasses
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from qaware.engines.base import QuantizedModel
from qaware.errors import QawareError
from qaware.exporters.artifact import Artifact, is_artifact_folder
from qaware.exporters.generation import cache_of, why_no_cache
from qaware.exporters.grids import require_grids
from qaware.exporters.signature import Signature
from qaware.files import atomic, sha256, size
from qaware.plan import Decision, Plan

Runner = Callable[..., Tensor]
"""An artifact on its runtime: positional tensors in, one float32 tensor out."""


@dataclass(frozen=True)
class Tolerance:
    """How far a runtime may be from the converted model before the run fails."""

    relative: float
    """Mean absolute difference over the standard deviation of the reference output."""
    kl: float
    """Mean KL(converted || runtime) over the last axis, in nats."""
    reason: str
    """Where the difference comes from."""
    steps: float | None = None
    """Largest difference in quantization steps, where the output is on an int8 grid; None: any."""
    stray: float = 0.01
    """Share of the values that may be further off: a sum on the edge between two integers early in a deep
    network moves many that come after it."""


def one_step(tolerance: Tolerance) -> Tolerance:
    """``tolerance``, and one step of the output's grid."""
    return dataclasses.replace(tolerance, steps=1.0)


@dataclass(frozen=True)
class Written:
    """What an exporter found out while it wrote a file."""

    notes: tuple[str, ...] = ()
    """Lines for the report, in front of those of ``Exporter.notes``."""
    details: dict[str, Any] = field(default_factory=dict)
    """Plain data for the sidecar, e.g. which operators a backend took."""


class Exporter(abc.ABC):
    """One runtime. Subclasses live in one file each and import their runtime's package only inside it."""

    name: ClassVar[str]
    suffix: ClassVar[str]
    """Of the file or folder, with the dot."""
    packages: ClassVar[tuple[str, ...]] = ()
    """Import names that must be installed."""
    extra: ClassVar[str] = ""
    """The extra of qaware that installs them; empty for a plugin."""
    tolerance: ClassVar[Tolerance]
    cache_length: int | None = None
    """Of a language model, tokens that its key-value cache holds; None: see ``cache_of``."""

    def missing(self) -> str | None:
        """Why this runtime cannot be used here, with the command that installs it; None when it can."""
        for package in self.packages:
            if not _installed(package):
                what = f"'qaware[{self.extra}]'" if self.extra else package.partition(".")[0]
                return f"{self.name}: package {package!r} is not installed; pip install {what}"
        return None

    @abc.abstractmethod
    def refuse(self, decision: Decision) -> str | None:
        """Why this runtime cannot hold one layer as planned (``decision.scheme``), or None."""

    def refuse_plan(self, plan: Plan) -> str | None:
        """Why this runtime cannot hold the plan as a whole, or None."""
        return None

    def unpacks(self, decision: Decision) -> str | None:
        """Why one layer that this runtime holds is multiplied in float, as for the support matrix, or None
        where the stored numbers are; of an exporter that does not say, that."""
        return f"what {self.name} multiplies is not said by its exporter"

    @abc.abstractmethod
    def write(
        self, quantized: QuantizedModel, example: tuple[Tensor, ...], signature: Signature, path: Path
    ) -> Written | None:
        """Lower ``quantized`` (a deep copy, free to change) and write a file, or a new folder of files, at
        ``path``; return what is worth telling about it."""

    @abc.abstractmethod
    def open(self, path: Path, signature: Signature) -> Runner:
        """Load a file or folder in this process. Inputs are validated by the caller."""

    def tolerance_for(self, plan: Plan) -> Tolerance:
        """The tolerance for ``plan``; a runtime that rounds no activation can be held to a tighter one."""
        return self.tolerance

    def notes(self, plan: Plan) -> tuple[str, ...]:
        """What this runtime does otherwise with ``plan`` than the converted model, for the report."""
        return ()

    def reference(self, quantized: QuantizedModel) -> nn.Module:
        """What the artifact is compared with: the converted model, unless the runtime differs by design."""
        return quantized.module

    def export(
        self,
        quantized: QuantizedModel,
        example: tuple[Tensor, ...],
        signature: Signature,
        path: Path,
        metadata: dict[str, Any] | None = None,
    ) -> Artifact:
        """Write the artifact and its sidecar, atomically; ``quantized`` is not changed.

        Args:
            quantized: the converted model.
            example: one tensor for each input of ``signature``.
            path: where to; the suffix is the exporter's own. What an export wrote there before is replaced.
            metadata: kept in the sidecar.

        Raises:
            QawareError: the package is missing, the disk is full, the plan is of other grids than the
                integers, an input is in half precision, ``path`` is a folder of something else, or the
                runtime's tools refuse the model (their message is carried over).
        """
        if problem := self.missing():
            raise QawareError(problem)
        if path.is_dir() and not is_artifact_folder(path):
            raise QawareError(f"{path}: is a folder that no export wrote; choose another path or remove it")
        require_grids(quantized)
        require_wide(signature)
        signature.validate(example)
        cached = _about_cache(quantized.module, signature, self.cache_length)
        work = copy.deepcopy(quantized)
        with atomic(path) as temporary:
            try:
                found = self.write(work, example, signature, temporary) or Written()
            except (QawareError, OSError):
                raise
            except Exception as error:
                raise QawareError(f"{self.name}: export failed: {first_line(error)}") from error
        recipe = {**quantized.plan.recipe.to_dict(), "hash": quantized.plan.recipe.hash}
        layers = {n: d.scheme.label for n, d in quantized.plan.quantized.items() if d.scheme}
        artifact = Artifact(
            path=path,
            runtime=self.name,
            signature=signature,
            recipe=recipe,
            layers=layers,
            sha256=sha256(path),
            bytes=size(path),
            notes=(*found.notes, *cached.notes, *self.notes(quantized.plan)),
            details={**found.details, **cached.details},
            metadata=metadata or {},
        )
        artifact.save()
        return artifact


def require_wide(signature: Signature) -> None:
    """Inputs in half precision, as ``bf16-true`` makes them of floats, pass no runtime."""
    for spec in signature.inputs:
        if spec.dtype in ("bfloat16", "float16"):
            raise QawareError(
                f"{spec.name}: is {spec.dtype}, and artifacts take float32 inputs; use precision: bf16-mixed "
                "or 32-true"
            )


def _about_cache(module: nn.Module, signature: Signature, length: int | None) -> Written:
    """The size of the key-value cache for the sidecar, or why a module that could have one gets none."""
    cache = cache_of(module, signature, length)
    if cache is not None:
        return Written(details={"cache": dataclasses.asdict(cache)})
    if not hasattr(module, "step"):
        return Written()
    return Written((f"no key-value cache: {why_no_cache(module, signature, length)}",))


def in_evaluation(module: nn.Module) -> nn.Module:
    """``module.eval()``, which a graph of torch.export inside would refuse: it was traced in its mode."""
    for part in module.modules():
        part.training = False
    return module


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of the package that a dotted name is in
        return False


def first_line(error: BaseException) -> str:
    """Type and first non-empty line of an error: what fits in one line of ours."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
