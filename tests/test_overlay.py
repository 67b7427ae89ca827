"""Overlays: complete, explained, and printed by the command line."""

from __future__ import annotations

import inspect
import re

import pytest
import yaml

from qaware import PostTrainingQuantization, QuantizationAwareTraining, recipe_names
from qaware.cli import main
from qaware.overlays import describe_overlay, overlay_names, read_overlay

CLASSES = {cls.__name__: cls for cls in (PostTrainingQuantization, QuantizationAwareTraining)}


def test_names() -> None:
    assert overlay_names() == ["ptq", "qat", "qat-distill", "qat-static"]
    assert not set(overlay_names()) & set(recipe_names()), "an overlay is no recipe"


@pytest.mark.parametrize("name", overlay_names())
def test_every_key_is_one_of_the_callbacks_and_explained(name: str) -> None:
    text = read_overlay(name)
    (callback,) = yaml.safe_load(text)["trainer"]["callbacks+"]
    package, _, cls = callback["class_path"].rpartition(".")
    assert package == "qaware.callbacks"
    assert callback["init_args"].keys() <= inspect.signature(CLASSES[cls]).parameters.keys()
    for key in callback["init_args"]:
        assert re.search(rf"# .*[.,;]\n +{key}: ", text), f"{key} has no comment above it"
    assert f"--config {name}.yaml" in text
    CLASSES[cls](**callback["init_args"])


def test_the_command_lists_and_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["overlay"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == overlay_names()
    assert all(describe_overlay(name) in line for name, line in zip(overlay_names(), listed, strict=True))
    assert main(["overlay", "qat"]) == 0
    assert capsys.readouterr().out == read_overlay("qat")


def test_an_unknown_name_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["overlay", "qatt"]) == 2
    said = capsys.readouterr().err
    assert said == "qaware: error: overlay: 'qatt' is not one of ptq, qat, qat-distill, qat-static\n"
