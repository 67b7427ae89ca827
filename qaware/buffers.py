"""Buffers that a model changes when it runs, such as a cache, kept as they are by runs that do not count."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def own_buffers(
    model: nn.Module, values: Mapping[str, Tensor] | None = None, but: tuple[type[nn.Module], ...] = ()
) -> Iterator[None]:
    """Inside, the buffers of ``model`` are copies; what is written to them is gone afterwards. One that a run
    makes, where there was none, stays.

    Args:
        model: any module.
        values: of some of them, by name, instead of their own.
        but: types of modules whose buffers are left as they are.
    """
    owners = {name: m for name, m in model.named_modules() if not isinstance(m, but)}
    kept = [(module._buffers, dict(module._buffers)) for module in owners.values()]
    copies: dict[int, Tensor] = {}
    for name, module in owners.items():
        for key, buffer in module._buffers.items():
            value = (values or {}).get(f"{name}.{key}" if name else key, buffer)
            if value is not None:
                device = value.device if buffer is None else buffer.device
                module._buffers[key] = copies.setdefault(id(buffer), value.to(device, copy=True))
    try:
        yield
    finally:
        for buffers, before in kept:
            buffers.update(before)
