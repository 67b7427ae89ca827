"""Experiment files: merged, overridden, and never a way to run code that the user did not allow."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import pytest
import yaml

from qaware import QawareError
from qaware.config import build, load_config


def write(folder: Path, name: str, data: object) -> str:
    path = folder / name
    path.write_text(yaml.safe_dump(data))
    return str(path)


def test_later_files_and_overrides_win(tmp_path: Path) -> None:
    first = write(tmp_path, "a.yaml", {"name": "a", "data": {"init_args": {"x": 1, "y": 2}}, "quantize": [1]})
    second = write(tmp_path, "b.yaml", {"data": {"init_args": {"y": 3}}})
    config = load_config([first, second, "data.init_args.x=[4, 5]", "name=c", "quantize+={recipe: float16}"])
    assert config == {
        "name": "c",
        "data": {"init_args": {"x": [4, 5], "y": 3}},
        "quantize": [1, {"recipe": "float16"}],
    }


def test_another_class_drops_the_arguments_of_the_first(tmp_path: Path) -> None:
    first = write(tmp_path, "a.yaml", {"model": {"class_path": "qaware.A", "init_args": {"x": 1}}})
    second = write(tmp_path, "b.yaml", {"model": {"class_path": "qaware.B"}})
    assert load_config([first, second])["model"] == {"class_path": "qaware.B"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"model": {"class_path": "os.system"}},
            r"model\.class_path: 'os.system' is not in qaware, lightning; .*--trust os",
        ),
        (
            {"data": {"init_args": {"x": {"class_path": "qaware.lm.CausalLM"}}}},
            r"data\.init_args\.x\.class_path: a class may only be named in model, data, trainer\.callbacks",
        ),
        (
            {"trainer": {"callbacks": [{"class_path": "subprocess.Popen"}]}},
            r"trainer\.callbacks\.class_path: 'subprocess\.Popen' is not in qaware",
        ),
        (["a"], "must be a mapping"),
    ],
)
def test_classes_are_refused_before_anything_is_imported(tmp_path: Path, data: object, message: str) -> None:
    with pytest.raises(QawareError, match=message):
        load_config([write(tmp_path, "x.yaml", data)])


def test_trusted_packages_may_be_named(tmp_path: Path) -> None:
    path = write(tmp_path, "x.yaml", {"model": {"class_path": "mine.Model"}})
    assert load_config([path], ["mine"])["model"]["class_path"] == "mine.Model"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give an experiment file"),
        (["missing.yaml"], r"missing\.yaml: cannot be read \(No such file"),
        (["a=1", "a.b=2"], "'a' is not a mapping"),
        (["a=[1"], r"a: '\[1' is not valid YAML"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str) -> None:
    with pytest.raises(QawareError, match=message):
        load_config(arguments)


def test_yaml_makes_no_objects(tmp_path: Path) -> None:
    path = tmp_path / "evil.yaml"
    path.write_text("name: !!python/object/apply:os.system ['echo no']")
    with pytest.raises(QawareError, match="is not valid YAML"):
        load_config([str(path)])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"class_path": "lightning.pytorch.Nope"}, "'lightning.pytorch.Nope' cannot be imported"),
        ({"class_path": "lightning.pytorch.Trainer"}, "is not a lightning.*LightningModule"),
        (
            {"class_path": "lightning.pytorch.demos.boring_classes.BoringModel", "init_args": {"width": 3}},
            "width",
        ),
        ({"init_args": {}}, "must be {class_path"),
        ("text", "must be {class_path"),
    ],
)
def test_build_refuses(spec: object, message: str) -> None:
    with pytest.raises(QawareError, match=message):
        build("model", spec, pl.LightningModule)


def test_build_checks_types() -> None:
    spec = {
        "class_path": "qaware.lm.TextDataModule",
        "init_args": {"source": "python-docs", "block_size": "many"},
    }
    with pytest.raises(QawareError, match="block_size"):
        build("data", spec, pl.LightningDataModule)
