"""Leave the attention of a model of `transformers` to whoever holds its keys and values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor

from qaware.errors import QawareError

Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""``(query, keys, values, scale)`` to (1, S, heads, dim); query is (1, heads, S, dim), the others are what
the cache's ``update`` returned."""

_NAME = "qaware"
_MORE = ("softcap", "s_aux", "position_bias", "head_mask")
"""What the attention of some models adds to the plain one."""
_chosen: ContextVar[Attend] = ContextVar("attend")


@contextmanager
def attention(model: Any, attend: Attend | None) -> Iterator[None]:
    """Compute the attention of ``model`` by ``attend``; None leaves it alone.

    Inside it raises a QawareError for a model whose attention is no plain one.
    """
    if attend is None:
        yield
        return
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(_NAME, _forward)
    config, token = model.config, _chosen.set(attend)
    before, config._attn_implementation = config._attn_implementation, _NAME
    try:
        yield
    finally:
        config._attn_implementation = before
        _chosen.reset(token)


def _forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **more: Any,
) -> tuple[Tensor, None]:
    """As `transformers` calls an attention; the mask is the causal one, which ``attend`` knows."""
    if added := [name for name in _MORE if more.get(name) is not None]:
        raise QawareError(f"{type(module).__name__}: its attention has {added[0]}, which no kernel here has")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _chosen.get()(query, key, value, scale), None
