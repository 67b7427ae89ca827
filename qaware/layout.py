"""Where a model's activations are rounded: found once from an example batch, kept as plain data.

A checkpoint and a saved model carry it, so that a model is prepared again without the example.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

OPERATIONS = ("add", "cat")
"""Functions whose result is rounded: residual additions and concatenations."""


@dataclass(frozen=True)
class LayerSite:
    """A convolution or linear layer with integer activations, and what is fused into it."""

    module: str
    batch_norm: str | None = None
    """The batch norm that is folded into the weight."""
    relu: bool = False
    """Whether a ReLU follows, so that the output's range starts at zero."""
    source: str | None = None
    """The site whose output enters here, perhaps reshaped or pooled; None: the layer rounds its input itself
    (a QuantStub, in PyTorch's words)."""
    ceiling: float | None = None
    """Where the ReLU ends at the top: 6 for ReLU6."""


@dataclass(frozen=True)
class OperationSite:
    """The result of a function that is called in a module's ``forward``."""

    owner: str
    """The module whose ``forward`` calls it; empty for the model itself."""
    kind: str
    """One of ``OPERATIONS``."""
    index: int
    """Which of the calls of this kind in one forward pass of the owner, from 0."""
    relu: bool = False
    ceiling: float | None = None
    place: str = ""
    """Where in the owner's code the call is, so that one which is made in training only is not mistaken for
    it: functions and lines within them, from ``forward`` inwards. Empty: ``index`` alone tells."""
    turn: int = 0
    """Which of the calls from that place in one forward pass, from 0: in a loop, or on the same line."""

    @property
    def name(self) -> str:
        """The site's name, that of the submodule which rounds: ``layer1.0.qaware_operations.add_0``."""
        prefix = f"{self.owner}." if self.owner else ""
        return f"{prefix}qaware_operations.{self.kind}_{self.index}"


@dataclass(frozen=True)
class Layout:
    """All sites, or what the graph engine needs to make its graph again."""

    engine: str
    """``eager`` or ``graph``."""
    layers: tuple[LayerSite, ...] = ()
    operations: tuple[OperationSite, ...] = ()
    scopes: tuple[str, ...] = ()
    """Modules without children that add or concatenate inside; their functions are counted apart."""
    graph: Mapping[str, Any] | None = None
    """The graph engine's own plain data."""

    def layer(self, module: str) -> LayerSite | None:
        """The site of a layer; None when its activations stay float."""
        return next((site for site in self.layers if site.module == module), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain data that ``from_dict`` reads back."""
        return {
            "engine": self.engine,
            "layers": [dataclasses.asdict(site) for site in self.layers],
            "operations": [dataclasses.asdict(site) for site in self.operations],
            "scopes": list(self.scopes),
            "graph": None if self.graph is None else dict(self.graph),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Layout:
        """Read back what ``to_dict`` wrote."""
        return cls(
            data["engine"],
            tuple(LayerSite(**site) for site in data["layers"]),
            tuple(OperationSite(**site) for site in data["operations"]),
            tuple(data["scopes"]),
            data["graph"],
        )
