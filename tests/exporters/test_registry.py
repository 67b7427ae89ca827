"""The registry: built-ins by hand, others by entry point, unknown names with what there is."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from qaware.errors import QawareError
from qaware.exporters import BUILTIN, exporter_names, get_exporter
from qaware.exporters.base import Exporter, Tolerance

PLUGIN = """
from qaware.exporters.base import Exporter, Tolerance

class Fine(Exporter):
    name, suffix, tolerance = "fine", ".fine", Tolerance(1, 1, "none")

    def refuse(self, decision): ...
    def write(self, quantized, example, signature, path): ...
    def open(self, path, signature): ...

class Needy(Fine):
    name = "needy"
    def __init__(self, device): ...

class Abstract(Exporter):
    name, suffix, tolerance = "abstract", ".abstract", Tolerance(1, 1, "none")

class Unrelated:
    name = "unrelated"

number = 5
"""


def install(folder: Path, name: str, target: str, source: str) -> None:
    """What pip would leave: a module and the metadata of its distribution."""
    (folder / f"{target.partition(':')[0]}.py").write_text(source)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[qaware.exporters]\n{name} = {target}\n")


@pytest.mark.parametrize("name", BUILTIN)
def test_builtins_are_complete_and_named_as_registered(name: str) -> None:
    exporter = get_exporter(name)
    assert isinstance(exporter, Exporter)
    assert exporter.name == name
    assert exporter.suffix.startswith(".")
    assert isinstance(exporter.tolerance, Tolerance)
    assert exporter.tolerance.relative > 0
    assert len(exporter.tolerance.reason) > 1


def test_suffixes_are_all_different() -> None:
    assert len({get_exporter(n).suffix for n in BUILTIN}) == len(BUILTIN)


def test_a_plugin_is_found_by_its_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "fine", "fine_plugin:Fine", PLUGIN)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert exporter_names() == [*BUILTIN, "fine"]
    assert get_exporter("fine").name == "fine"


def test_a_plugin_does_not_replace_a_builtin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "aoti", "usurper_plugin:Fine", PLUGIN)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert type(get_exporter("aoti")).__module__ == "qaware.exporters.aoti"
    assert exporter_names().count("aoti") == 1


def test_a_broken_plugin_is_named_and_does_not_hide_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "broken", "broken_plugin:Fine", "import no_such_package")
    install(tmp_path, "fine", "fine_plugin2:Missing", PLUGIN)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(
        QawareError, match=r"runtime: 'broken' cannot be loaded from broken_plugin:Fine .*no_such_package"
    ):
        get_exporter("broken")
    with pytest.raises(QawareError, match=r"'fine' cannot be loaded.*Missing"):
        get_exporter("fine")
    assert get_exporter("aoti").name == "aoti"


@pytest.mark.parametrize(
    ("name", "target", "words"),
    [
        (
            "number",
            "number",
            r"runtime: 'number' is 5 \(odd_plugin:number\); give a class of qaware's Exporter",
        ),
        ("unrelated", "Unrelated", r"'unrelated' is <class .*; give a class of qaware's Exporter"),
        ("finer", "Fine", r"'finer' is an exporter with name = 'fine' \(odd_plugin:Fine\); make them one"),
        ("needy", "Needy", r"export.needy: Needy cannot be made \(.*'device'"),
        ("abstract", "Abstract", r"export.abstract: Abstract cannot be made \(.*abstract method"),
    ],
)
def test_what_is_no_exporter_of_its_name_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, target: str, words: str
) -> None:
    install(tmp_path, name, f"odd_plugin:{target}", PLUGIN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "odd_plugin", raising=False)
    with pytest.raises(QawareError, match=words):
        get_exporter(name)


@pytest.mark.parametrize("length", ["long", 0, -4, True, 2.0])
def test_a_cache_length_is_a_number_of_tokens(length: object) -> None:
    with pytest.raises(QawareError, match=r"^export.tract.cache_length: .* must be a number of tokens"):
        get_exporter({"tract": {"cache_length": length}})


def test_an_unknown_name_lists_what_there_is() -> None:
    with pytest.raises(QawareError, match="runtime: 'onnx' is not one of executorch, aoti, tract"):
        get_exporter("onnx")
