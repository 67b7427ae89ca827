"""Find where activations are rounded, and what is fused before it, from the dataflow of an example.

The rules are those of PyTorch's eager quantization (``fuse_modules``) and of integer kernels: a batch norm
is folded into the layer before it, a ReLU becomes the lower end of the output's range, and the results
of layers, residual additions and concatenations are integers. What only moves values about passes its
integers on; everything else computes in float between them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from qaware.engines.dataflow import Call, Dataflow
from qaware.engines.operations import kind_of
from qaware.layout import LayerSite, Layout, OperationSite
from qaware.sharded import plain_class

_RELU = ("relu", "relu_")
_MOVES = {
    *("flatten", "view", "reshape", "permute", "transpose", "contiguous", "squeeze", "unsqueeze"),
    *("max_pool1d", "max_pool2d", "dropout", "dropout2d", "clone", "detach", "__getitem__"),
    *("chunk", "split", "narrow", "pixel_shuffle", "channel_shuffle", *_RELU),
}
"""Functions of which every result is one of the inputs, or zero, which is on every grid."""
_MOVING_MODULES = (
    *(nn.Identity, nn.Flatten, nn.Unflatten, nn.MaxPool1d, nn.MaxPool2d, nn.ReLU),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.PixelShuffle, nn.ChannelShuffle),
)
_NORMS: dict[type, tuple[type, int]] = {
    nn.Conv1d: (nn.BatchNorm1d, 3),
    nn.Conv2d: (nn.BatchNorm2d, 4),
    nn.Linear: (nn.BatchNorm1d, 2),
}
"""The norm that can be folded into a layer, and the rank of the tensor between."""


def find_layout(flow: Dataflow, static: set[str]) -> Layout:
    """The sites of a model.

    Args:
        flow: of the float model.
        static: names of the Linear, Conv1d and Conv2d modules whose activations are to be integers.
    """
    return _Finder(flow, static).find()


def outside_stubs(flow: Dataflow) -> set[str] | None:
    """Modules that the model's own QuantStubs and DeQuantStubs leave in float; None when it has none."""
    stubs = [call for call in flow.calls if _is_stub(call, "QuantStub")]
    if not stubs:
        return None
    inside: set[int] = set()
    outside = set()
    for call in flow.calls:
        entered = any(value in inside for value in call.inputs)
        if _is_stub(call, "QuantStub") or (entered and not _is_stub(call, "DeQuantStub")):
            inside.update(call.outputs)
        if call.module is not None and not entered:
            outside.add(call.name)
    return outside


def _is_stub(call: Call, name: str) -> bool:
    cls = type(call.module)
    return cls.__name__ == name and cls.__module__.startswith(("torch.ao.", "torch.quantization"))


@dataclass
class _Finder:
    flow: Dataflow
    static: set[str]
    fused: dict[str, LayerSite] = field(default_factory=dict)
    found: dict[OperationSite, None] = field(default_factory=dict)
    passing: dict[int, int] = field(default_factory=dict)
    """Output of a fused norm or ReLU, and the tensor that it makes no different any more."""

    def find(self) -> Layout:
        for name in sorted(self.static):
            calls = self.flow.of(name)
            if len(calls) == 1:
                self.fused[name] = self._fuse(calls[0])
        return self._propagate()

    def _fuse(self, call: Call) -> LayerSite:
        """The norm and the ReLU that alone take a layer's result."""
        norm, value = None, call.outputs[0]
        after = self._only_consumer(value)
        if after is not None and self._folds(call, after):
            norm, self.passing[after.outputs[0]] = after.name, value
            value = after.outputs[0]
        relu, ceiling = self._takes_relu(value)
        return LayerSite(call.name, norm, relu, ceiling=ceiling)

    def _only_consumer(self, value: int) -> Call | None:
        consumers = self.flow.consumers(value)
        return consumers[0] if len(consumers) == 1 and value not in self.flow.outputs else None

    def _folds(self, call: Call, after: Call) -> bool:
        norm = after.module
        kind, rank = _NORMS[plain_class(call.module)] if call.module is not None else (object, 0)
        return (
            type(norm) is kind
            and getattr(norm, "running_mean", None) is not None
            and len(call.shape) == rank
            and len(self.flow.of(after.name)) == 1
        )

    def _takes_relu(self, value: int) -> tuple[bool, float | None]:
        """Whether a ReLU alone takes a result, and where it ends at the top."""
        after = self._only_consumer(value)
        if after is None or not (_is_relu(after) or _is_relu6(after)):
            return False, None
        self.passing[after.outputs[0]] = value
        return True, 6.0 if _is_relu6(after) else None

    def _propagate(self) -> Layout:
        """Follow each site's integers to the layers that they enter."""
        grids: dict[int, str] = {}
        sources: dict[str, set[str | None]] = {}
        joined = self._operations()
        for call in self.flow.calls:
            entering = grids.get(call.inputs[0]) if call.inputs else None
            made: str | None = None
            if call.module is not None and call.name in self.static:
                sources.setdefault(call.name, set()).add(entering)
                made = call.name
            elif call.outputs and (site := joined.get(call.outputs[0])) is not None:
                if any(value in grids for value in call.inputs):
                    self.found[site], made = None, site.name
            elif call.outputs and (call.outputs[0] in self.passing or _moves(call)):
                made = entering
            if made is not None:
                grids.update(dict.fromkeys(call.outputs, made))
        scopes = tuple(name for name in self.flow.scopes if name not in self.static)
        return Layout("eager", self._layers(sources), tuple(self.found), scopes if self.found else ())

    def _operations(self) -> dict[int, OperationSite]:
        """The site of each result that is added or concatenated. An owner that runs several times has the
        same sites each time, with a ReLU fused only where every time one follows."""
        numbers: Counter[Any] = Counter()
        turns: Counter[Any] = Counter()
        sites: dict[Any, OperationSite] = {}
        keys: dict[int, Any] = {}
        for call in self.flow.calls:
            kind = kind_of(call.function, call.tensors) if call.module is None else None
            if kind is None:
                continue
            key = call.owner, kind, call.place, turns[call.visit, kind, call.place]
            turns[call.visit, kind, call.place] += 1
            index = numbers[call.visit, kind]
            numbers[call.visit, kind] += 1
            keys[call.outputs[0]] = key
            relu, ceiling = self._takes_relu(call.outputs[0])
            known = sites.get(key)
            if known is None:
                taken = {s.index for s in sites.values() if (s.owner, s.kind) == (call.owner, kind)}
                index = max(taken) + 1 if index in taken else index
                sites[key] = OperationSite(call.owner, kind, index, relu, ceiling, call.place, key[3])
            elif (known.relu, known.ceiling) != (relu, ceiling):
                sites[key] = replace(known, relu=False, ceiling=None)
        return {value: sites[key] for value, key in keys.items()}

    def _layers(self, sources: dict[str, set[str | None]]) -> tuple[LayerSite, ...]:
        """A layer whose input comes from several sites rounds it once more, by itself."""
        sites = []
        for name, entering in sources.items():
            source = next(iter(entering)) if len(entering) == 1 else None
            sites.append(replace(self.fused.get(name, LayerSite(name)), source=source))
        return tuple(sites)


def _is_relu(call: Call) -> bool:
    return type(call.module) is nn.ReLU if call.module is not None else _leaf_name(call) in _RELU


def _is_relu6(call: Call) -> bool:
    return type(call.module) is nn.ReLU6 if call.module is not None else _leaf_name(call) == "relu6"


def _moves(call: Call) -> bool:
    if call.module is not None:
        return isinstance(call.module, _MOVING_MODULES) or _is_stub(call, "QuantStub")
    return _leaf_name(call) in _MOVES


def _leaf_name(call: Call) -> Any:
    return call.name.rpartition(".")[2]
