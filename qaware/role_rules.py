"""``roles:`` of a recipe, a short form for rules: one scheme for each part of a network.

The words and their order of precedence are those of AI Edge Torch's ``GenerativeQuantRecipe`` (now in
``litert_torch/generative/quantize/quant_recipe.py``): ``default`` is for every layer that no other one is
for, and attention and feedforward may have a scheme of their own in single blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qaware.errors import QawareError
from qaware.roles import ROLES

_DEFAULT = "default"
_IN_BLOCKS = ("attention", "feedforward")
_TYPES = ("Linear", "Embedding")
"""What ``default`` is for."""


def rules_of(roles: Any) -> list[dict[str, Any]]:
    """The rules, as :meth:`qaware.recipe.Rule.from_dict` reads them, that ``roles`` stands for.

    Args:
        roles: a mapping of ``default``, ``embedding``, ``attention``, ``feedforward`` or ``head`` to a
            scheme, or to null for layers that stay float; for attention and feedforward also to a mapping of
            numbers of blocks to schemes, where the other blocks get the default.

    Raises:
        QawareError: neither, or an unknown role.
    """
    known = (_DEFAULT, *ROLES)
    if not isinstance(roles, Mapping) or not roles:
        raise QawareError(f"roles: {roles!r} must be a mapping of {', '.join(known)} to schemes")
    for role in roles:
        if role not in known:
            raise QawareError(f"roles: unknown role {role!r}; known: {', '.join(known)}")
    rules = [rule for role in ROLES if role in roles for rule in _of_role(role, roles[role])]
    if _DEFAULT in roles:
        rules += [{"type": kind, "scheme": roles[_DEFAULT]} for kind in _TYPES]
    return rules


def _of_role(role: str, scheme: Any) -> Iterator[dict[str, Any]]:
    if not _by_block(scheme):
        yield {"role": role, "scheme": scheme}
        return
    if role not in _IN_BLOCKS:
        raise QawareError(f"roles.{role}: is in no block; give it one scheme")
    for block, own in scheme.items():
        yield {"role": role, "blocks": [int(block)], "scheme": own}


def _by_block(scheme: Any) -> bool:
    """Whether the keys are numbers, which JSON writes as text."""
    return isinstance(scheme, Mapping) and any(str(key).lstrip("-").isdigit() for key in scheme)
