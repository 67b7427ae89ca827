"""What XNNPACK holds, by hand. That each limit is one of the runtime is tested in test_executorch."""

from __future__ import annotations

import pytest

from qaware.exporters.executorch_limits import kernel_bits, refusal, signed_scales, widened
from qaware.plan import Decision, Plan
from qaware.recipe import Recipe
from qaware.scheme import Scheme

DYNAMIC = {"activation": "int8-dynamic", "scale_dtype": "bfloat16"}


def layer(scheme: Scheme | None, kind: str = "Linear") -> Decision:
    return Decision("a.weight", "a", kind, (8, 64), None, scheme, "")


@pytest.mark.parametrize(
    ("scheme", "kind", "bits", "line"),
    [
        (Scheme(2, 32, **DYNAMIC), "Linear", 4, "2 bits take 4"),
        (Scheme(3, 32, levels="stretched", **DYNAMIC), "Linear", 4, "3 bits take 4"),
        (Scheme(4, 32, **DYNAMIC), "Linear", 4, None),
        (Scheme(1, 32, levels="stretched"), "Embedding", 2, "1 bits take 2"),
        (Scheme(2, 32, levels="stretched"), "Embedding", 4, "2 bits take 4"),
        (Scheme(2, 32, levels="ternary"), "Embedding", 2, None),
        (Scheme(3, activation="int8-static"), "Linear", None, None),
        (Scheme(16), "Linear", None, None),
        (None, "Linear", None, None),
    ],
)
def test_the_narrowest_kernel_that_holds_the_integers(
    scheme: Scheme | None, kind: str, bits: int | None, line: str | None
) -> None:
    decision = layer(scheme, kind)
    assert refusal(decision) is None
    assert kernel_bits(decision) == bits
    assert widened(decision) == line


@pytest.mark.parametrize(
    ("scheme", "kind", "said"),
    [
        (Scheme(4), "Linear", "weight-only int4 linear layers lose their scales"),
        (Scheme(8), "Conv2d", "weight-only int8 convolutions lose their scales"),
        (Scheme(5, **DYNAMIC), "Linear", "int5 linear layers have no kernel"),
        (Scheme(4, 16, **DYNAMIC), "Linear", "multiple of 32 on XNNPACK, not 16"),
        (Scheme(2, 32, activation="int8-dynamic"), "Linear", "int4 scales as bfloat16"),
        (Scheme(8, 32, activation="int8-dynamic"), "Linear", "one scale per channel"),
        (Scheme(4, 32, symmetric=False, **DYNAMIC), "Linear", "lose their zero points"),
        (Scheme(3, 32), "Embedding", "int3 embeddings have no kernel"),
        (Scheme(8, 32, activation="int8-static"), "Linear", "no groups"),
    ],
)
def test_refusals(scheme: Scheme, kind: str, said: str) -> None:
    assert said in str(refusal(layer(scheme, kind)))


@pytest.mark.parametrize(
    ("scheme", "kind", "refused"),
    [
        (Scheme(4, 32, **DYNAMIC), "Linear", True),
        (Scheme(8, activation="int8-dynamic"), "Linear", True),
        (Scheme(3, 32, levels="stretched", **DYNAMIC), "Linear", False),
        (Scheme(4, activation="int8-static"), "Linear", False),
        (Scheme(4, 32), "Embedding", False),
        (Scheme(16), "Linear", False),
    ],
)
def test_scales_below_zero(scheme: Scheme, kind: str, refused: bool) -> None:
    for name in ("gptq", "mse"):
        recipe = Recipe.from_dict({"rules": [{"name": "*"}], "rounding": {name: {"signed": True}}})
        said = signed_scales(Plan(recipe, (layer(scheme, kind),)))
        assert (said is not None) == refused
        assert said is None or f"rounding.{name}.signed: true makes scales below zero" in said
    assert signed_scales(Plan(Recipe.from_dict({"rules": [{"name": "*"}], "rounding": "gptq"}), ())) is None


def test_q4_0_turns_scales_of_linear_layers_around() -> None:
    made = Recipe.load("min_max_q4_0")
    linear, table = (layer(Scheme(4, 32, scale_dtype="float16"), kind) for kind in ("Linear", "Embedding"))
    assert "rounding.q4-0 makes scales below zero" in str(signed_scales(Plan(made, (table, linear))))
    assert signed_scales(Plan(made, (table,))) is None
