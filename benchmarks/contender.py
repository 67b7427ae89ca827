"""One model in one form on one runtime: how it is made, opened and called."""

from __future__ import annotations

import abc
import dataclasses
import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from benchmarks.inputs import Array

LM, CNN = "lm", "cnn"
MODELS = {LM: ("decode", "prefill"), CNN: ("image",)}
"""What is timed of each model: the next token, 128 tokens, one image."""
Session = Mapping[str, Callable[[], Array]]
"""What is timed, by name. A call does all the work on inputs made beforehand and gives the logits:
``decode`` (1, 1, vocabulary), ``prefill`` (1, 128, vocabulary), ``image`` (1, 10). An artifact without a
key-value cache has ``alone`` for ``decode``: one token with nothing before it."""


@dataclass(frozen=True)
class Contender:
    """A file, or what a runtime makes of the float model as it loads."""

    runtime: str
    model: str
    variant: str
    """``fp32``, ``int8``, ``int4``, or another form of the same weights."""
    path: str
    bytes: int
    note: str = ""
    """How it was made, for the table."""

    @property
    def name(self) -> str:
        """In the table."""
        return f"{self.runtime} {self.variant}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a child process."""
        return dataclasses.asdict(self)


class Runtime(abc.ABC):
    """What contenders are built for. Packages are imported inside the methods, each in its own process."""

    name: ClassVar[str]
    packages: ClassVar[tuple[str, ...]]
    """Import names that must be installed."""
    variants: ClassVar[Mapping[str, tuple[str, ...]]]
    """By model."""
    extra: ClassVar[str] = "bench"

    def missing(self) -> str | None:
        """Why this runtime is skipped, with the command that installs it; None when it is there."""
        for package in self.packages:
            if importlib.util.find_spec(package) is None:
                return f"{package} is not installed; pip install 'qaware[{self.extra}]'"
        return None

    @abc.abstractmethod
    def build(self, model: str, variant: str, size: str, folder: Path) -> Contender:
        """Write the file of a variant into ``folder``; other variants may have left theirs there."""

    def imports(self) -> None:
        """Import what opening needs, so that it counts neither as load time nor as memory."""
        for package in self.packages:
            importlib.import_module(package)

    @abc.abstractmethod
    def open(self, contender: Contender, size: str, threads: int) -> Session:
        """Load the file for a number of threads."""


RUNTIMES = {
    "executorch": "benchmarks.ours:ExecuTorch",
    "aoti": "benchmarks.ours:AOTI",
    "tract": "benchmarks.ours:Tract",
    "onnxruntime": "benchmarks.peers.onnxruntime:OnnxRuntime",
    "openvino": "benchmarks.peers.openvino:OpenVINO",
    "litert": "benchmarks.peers.litert:LiteRT",
    "llama.cpp": "benchmarks.peers.llama_cpp:LlamaCpp",
    "torch": "benchmarks.peers.torch:Torch",
}
OURS = ("executorch", "aoti", "tract")


def runtime(name: str) -> Runtime:
    """By its name in ``RUNTIMES``."""
    module, _, attribute = RUNTIMES[name].partition(":")
    made: Runtime = getattr(importlib.import_module(module), attribute)()
    return made
