"""Entry points of other packages: their names without an import, and one line for what cannot be loaded."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from qaware import plugins
from qaware.errors import QawareError
from qaware.plugins import find_plugin, load_plugin, plugin_names

GROUP = "qaware.test"
ENTRIES = [
    EntryPoint("good", f"{__name__}:GROUP", GROUP),
    EntryPoint("broken", "no_such_package:x", GROUP),
    EntryPoint("absent", f"{__name__}:NOTHING", GROUP),
    EntryPoint("good", "no_such_package:x", GROUP),
    EntryPoint("script", "qaware_plugin_that_exits:main", GROUP),
]


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins, "entry_points", lambda group: ENTRIES if group == GROUP else [])


def test_names_are_listed_once_and_the_first_package_has_them() -> None:
    assert plugin_names(GROUP) == ["good", "broken", "absent", "script"]
    assert plugin_names("qaware.other") == []
    found = find_plugin(GROUP, "good")
    assert found is not None
    assert load_plugin(found, "test") == GROUP
    assert find_plugin(GROUP, "other") is None


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("broken", r"test: 'broken' cannot be loaded from no_such_package:x \(ModuleNotFoundError: "),
        ("absent", rf"test: 'absent' cannot be loaded from {__name__}:NOTHING \(AttributeError: "),
        ("script", r"test: 'script' cannot be loaded from .*:main \(SystemExit: 3\)"),
    ],
)
def test_what_cannot_be_loaded_is_one_line(
    name: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "qaware_plugin_that_exits.py").write_text("raise SystemExit(3)")
    monkeypatch.syspath_prepend(tmp_path)
    entry = find_plugin(GROUP, name)
    assert entry is not None
    with pytest.raises(QawareError, match=words):
        load_plugin(entry, "test")
