"""torchchat's JSON: every key, its defaults, and what its tables refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qaware.cli import main
from qaware.errors import QawareError
from qaware.recipe import Recipe, Rule
from qaware.scheme import Scheme
from qaware.torchchat import QUANTIZERS, is_torchchat

ISSUE = '{"embedding": {"bitwidth": 4, "groupsize": 32}, "linear:a8w4dq": {"groupsize": 256}}'
BF16 = "bfloat16"

PROFILES: dict[str, dict[str, Any]] = {
    "torchchat-cuda": {
        "executor": {"accelerator": "cuda"},
        "precision": {"dtype": "bf16"},
        "linear:int4": {"groupsize": 256},
    },
    "torchchat-desktop": {"executor": {"accelerator": "fast"}, "precision": {"dtype": "fast16"}},
    "torchchat-mobile": {
        "embedding": {"bitwidth": 4, "groupsize": 32},
        "linear:a8w4dq": {"groupsize": 256},
    },
    "torchchat-pi5": {
        "executor": {"accelerator": "cpu"},
        "precision": {"dtype": "fast16"},
        "embedding": {"bitwidth": 4, "groupsize": 32},
        "linear:a8w4dq": {"groupsize": 256},
    },
}
"""The files of these names in torchchat's repository."""


def scheme_of(key: str, options: dict[str, Any]) -> Scheme | None:
    (rule,) = Recipe.load({key: options}).rules
    assert rule == Rule(rule.scheme, type=key.split(":")[0].capitalize())
    return rule.scheme


@pytest.mark.parametrize(
    ("key", "options", "expected"),
    [
        ("embedding", {"bitwidth": 4, "groupsize": 32}, Scheme(4, 32, scale_dtype=BF16)),
        ("embedding", {"bitwidth": 8, "groupsize": 8}, Scheme(8, 8)),
        ("embedding", {}, Scheme(8)),
        ("embedding:wx", {"bitwidth": 2, "groupsize": 32}, Scheme(2, 32, "none", False, BF16)),
        ("embedding:wx", {"bitwidth": 5}, Scheme(5, 128, "none", False)),
        ("linear:int8", {"groupsize": 0}, Scheme(8)),
        ("linear:int8", {"bitwidth": 8, "groupsize": 8}, Scheme(8, 8)),
        ("linear:int4", {"groupsize": 64}, Scheme(4, 64, "none", False, BF16)),
        ("linear:int4", {}, Scheme(4, 256, "none", False, BF16)),
        ("linear:a8w4dq", {"groupsize": 0}, Scheme(4, 0, "int8-dynamic", True, BF16)),
        ("linear:a8w4dq", {"groupsize": 512}, Scheme(4, 512, "int8-dynamic", True, BF16)),
        ("linear:a8w4dq", {}, Scheme(4, 256, "int8-dynamic", True, BF16)),
        (
            "linear:a8wxdq",
            {"bitwidth": 3, "groupsize": 128, "has_weight_zeros": False},
            Scheme(3, 128, "int8-dynamic", True, BF16),
        ),
        (
            "linear:a8wxdq",
            {"bitwidth": 7, "groupsize": 0, "has_weight_zeros": True},
            Scheme(7, 0, "int8-dynamic", False),
        ),
        ("linear:a8wxdq", {}, Scheme(4, 128, "int8-dynamic", True, BF16)),
        ("linear:afpwx", {"bitwidth": 1, "groupsize": 256}, Scheme(1, 256, "none", False, BF16)),
        ("linear:afpwx", {}, Scheme(4, 128, "none", False, BF16)),
    ],
)
def test_each_key_is_the_scheme_that_torchchat_says(
    key: str, options: dict[str, Any], expected: Scheme
) -> None:
    assert scheme_of(key, options) == expected


@pytest.mark.parametrize("bits", range(1, 8))
@pytest.mark.parametrize("key", ["linear:a8wxdq", "linear:afpwx", "embedding:wx"])
def test_low_bits_are_1_to_7(key: str, bits: int) -> None:
    scheme = scheme_of(key, {"bitwidth": bits})
    assert scheme is not None
    assert scheme.bits == bits


def test_a_string_a_file_and_a_mapping_are_one_recipe(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(ISSUE)
    made = Recipe.load(ISSUE)
    assert made.name == "embedding-4-g32+linear.a8w4dq-4-g256"
    assert Recipe.load(json.loads(ISSUE)) == made
    assert Recipe.load(path).rules == Recipe.load(str(path)).rules == made.rules
    assert Recipe.load(path).name == "mine"
    assert Recipe.load(f"  {ISSUE}\n") == made


def test_json_may_be_a_recipe_of_ours_too(tmp_path: Path) -> None:
    mine = {"name": "x", "rules": [{"type": "Linear", "scheme": {"bits": 8}}]}
    (tmp_path / "x.json").write_text(json.dumps(mine))
    assert Recipe.load(json.dumps(mine)) == Recipe.load(tmp_path / "x.json") == Recipe.from_dict(mine)


def test_other_weights_are_16_bits_where_precision_says_so() -> None:
    half = (Rule(Scheme(16), type="Embedding"), Rule(Scheme(16), type="Linear"))
    for dtype in ("fp16", "half", "float16", "bf16", "bfloat16", "fast", "fast16"):
        made = Recipe.load({"precision": {"dtype": dtype}, "linear:int8": {}})
        assert made.rules == (Rule(Scheme(8), type="Linear"), *half)
        assert f"precision.dtype {dtype}: weights that no other key is for are kept in float16" in (
            made.description
        )
        assert made.name == f"linear.int8-8-channel+{dtype}"
    for dtype in ("fp32", "float", "float32"):
        assert len(Recipe.load({"precision": {"dtype": dtype}, "linear:int8": {}}).rules) == 1


def test_the_accelerator_is_noted_and_changes_nothing() -> None:
    plain = Recipe.load({"linear:int8": {}})
    made = Recipe.load({"executor": {"accelerator": "mps"}, "linear:int8": {}})
    assert made.hash == plain.hash
    assert "executor.accelerator mps" in made.description


@pytest.mark.parametrize("name", PROFILES)
def test_a_shipped_profile_is_what_its_json_gives(name: str) -> None:
    assert Recipe.load(name).hash == Recipe.load(PROFILES[name]).hash


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ({"linear:a8w4d": {}}, "unknown key 'linear:a8w4d'; did you mean 'linear:a8w4dq'? known: embedding"),
        ({"linear:gptq": {}}, "unknown key 'linear:gptq'"),
        (
            {"linear:int8": {"group_size": 8}},
            "linear:int8: unknown key 'group_size'; did you mean 'groupsize'",
        ),
        ({"linear:int4": {"bitwidth": 4}}, "linear:int4: unknown key 'bitwidth'; known: groupsize"),
        ({"linear:int4": {"groupsize": 48}}, "linear:int4.groupsize: 48 is not one of 0, 32, 64, 128, 256"),
        ({"linear:afpwx": {"groupsize": 0}}, "linear:afpwx.groupsize: 0 is not one of 32, 64, 128, 256"),
        ({"linear:afpwx": {"bitwidth": 8}}, "linear:afpwx.bitwidth: 8 is not one of 1, 2, 3, 4, 5, 6, 7"),
        ({"linear:a8wxdq": {"bitwidth": 0}}, "linear:a8wxdq.bitwidth: 0 is not one of"),
        ({"embedding": {"bitwidth": 2}}, "embedding.bitwidth: 2 is not one of 4, 8"),
        ({"embedding": {"bitwidth": 4.0}}, "embedding.bitwidth: 4.0 is not one of"),
        ({"embedding": {"bitwidth": True}}, "embedding.bitwidth: True is not one of"),
        ({"embedding": {"groupsize": -1}}, "embedding.groupsize: -1 must be 0 (one scale per channel), 2 or"),
        ({"embedding": {"groupsize": 1}}, "embedding.groupsize: 1 must be 0"),
        ({"linear:a8w4dq": {"groupsize": None}}, "linear:a8w4dq.groupsize: None must be 0"),
        (
            {"linear:a8wxdq": {"has_weight_zeros": 1}},
            "linear:a8wxdq.has_weight_zeros: 1 must be true or false",
        ),
        ({"linear:int8": 8}, "linear:int8: 8 must be a mapping of options"),
        ({"linear:int8": {}, "rule": []}, "torchchat: unknown key 'rule'"),
        (
            {"linear:int8": {}, "linear:int4": {}},
            "linear:int4: Linear layers have 'linear:int8' already; keep",
        ),
        ({"executor": {"accelerator": "tpu"}}, "executor.accelerator: 'tpu' is not one of cpu, cuda, mps"),
        ({"executor": {"device": "cpu"}}, "executor: unknown key 'device'; known: accelerator"),
        ({"executor": {}}, "executor.accelerator: None is not one of"),
        ({"precision": {"dtype": "int8"}}, "precision.dtype: 'int8' is not one of fp32"),
        (
            {"executor": {"accelerator": "cpu"}},
            "executor alone: nothing would be quantized; add one of embedding",
        ),
        ('{"linear:int8": }', "recipe: is not valid JSON"),
        ("{'linear:int8': {}}", "recipe: is not valid JSON"),
    ],
)
def test_what_torchchat_has_not_is_refused(source: Any, words: str) -> None:
    with pytest.raises(QawareError) as caught:
        Recipe.load(source)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_bad_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text("{")
    with pytest.raises(QawareError, match=r"bad\.json: is not valid JSON"):
        Recipe.load(path)
    with pytest.raises(QawareError, match=r"missing\.json: cannot be read"):
        Recipe.load(tmp_path / "missing.json")


def test_what_is_meant_as_torchchat() -> None:
    assert all(is_torchchat({key: {}}) for key in (*QUANTIZERS, "linear:nothing", "executor", "precision"))
    assert not any(map(is_torchchat, ({}, {"rules": []}, {"name": "x"}, {"roles": {}, "embedding": {}}, [])))


def test_the_command_line_takes_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", ISSUE]) == 0
    assert "group_size: 256" in capsys.readouterr().out
