"""Two sets of levels that several tests share: FP4 (E2M1), whose integers take 5 bits, and eight powers of
two, more below zero than above, whose integers take 4."""

from __future__ import annotations

import qaware
from qaware.scheme import Scheme

FP4 = (-12, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 12)
POWERS = (-8, -4, -2, -1, 0, 1, 2, 4)
qaware.register_levels("test-fp4", FP4)
qaware.register_levels("test-powers", POWERS)
SCHEMES = [
    Scheme(4, 32, levels="test-fp4", scale_dtype="bfloat16"),
    Scheme(3, 32, levels="test-powers", scale_dtype="bfloat16"),
]
