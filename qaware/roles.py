"""The part a layer plays in a network: embedding, attention, feedforward or head.

Roles let one recipe fit many models, as the generative recipes of AI Edge Torch do. They are read
from module types and names, because those are all that PyTorch records.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from qaware.adapters import find_places, successor

if TYPE_CHECKING:
    from torch import nn

ROLES = ("embedding", "attention", "feedforward", "head")

_ATTENTION = re.compile(
    r"(^|[._])(\w*attn\w*|\w*attention\w*|[qkvo]_proj|qkv(_proj)?|query|key|value)([._]|$)"
)
_FEEDFORWARD = re.compile(
    r"(^|[._])(mlp|ffn?|feed_?forward|\w*experts?|(gate|up|down)_proj|fc[12]|w[123]|intermediate)([._]|$)"
)
_HEAD = ("lm_head", "head", "output", "out", "classifier", "fc", "score", "embed_out")


def find_roles(model: nn.Module) -> dict[str, str]:
    """Name of each module that has a role, and the role. A tied head is a head and an embedding.

    A layer under an adapter has the role that it has without; adapters have none.
    """
    heads = _declared_heads(model)
    places = find_places(model)
    roles: dict[str, str] = {}
    for name, module in model.named_modules():
        place = places.get(name)
        if place is None or place.dropped is None:
            role = _role(name if place is None else place.name, module, heads)
            if role is not None:
                roles[name] = role
    return roles


def _role(name: str, module: nn.Module, heads: set[int]) -> str | None:
    from torch import nn

    if isinstance(module, nn.Embedding):
        return "embedding"
    if id(module) in heads or (not heads and _looks_like_head(name, module)):
        return "head"
    if _ATTENTION.search(name):
        return "attention"
    return "feedforward" if _FEEDFORWARD.search(name) else None


def _declared_heads(model: nn.Module) -> set[int]:
    """Modules that a ``transformers`` model names as its output embeddings."""
    heads = set()
    for module in model.modules():
        declared = getattr(module, "get_output_embeddings", None)
        head = declared() if callable(declared) else None
        while head is not None:
            heads.add(id(head))
            head = successor(head)
    return heads


def _looks_like_head(name: str, module: nn.Module) -> bool:
    from torch import nn

    return isinstance(module, nn.Linear) and name.rpartition(".")[2] in _HEAD and not _inside_block(name)


def _inside_block(name: str) -> bool:
    """Whether the name contains an index, as in ``layers.3.output``: a block's projection, not a head."""
    return any(part.isdigit() for part in name.split("."))
