"""Pages of docs/ that hold files: such a block has the file's name behind its language."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
_NAMED = re.compile(r"```\w+ ([\w.-]+)\n(.*?)```", flags=re.S)
_ENTRIES = re.compile(r'^\[project\.entry-points\."([\w.]+)"\]\n((?:[\w-]+ = ".*"\n)+)', flags=re.M)


def blocks(page: Path) -> list[str]:
    """The Python that is no file, in order."""
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S)


def install(page: Path, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Leave the files of ``page`` in ``folder``, with the entry points of its pyproject.toml, as pip would,
    here and for child processes; the modules are forgotten when ``patch`` is undone."""
    files = dict(_NAMED.findall(page.read_text(encoding="utf-8")))
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
        if name.endswith(".py"):
            patch.setitem(sys.modules, name[:-3], sys)  # so that undoing removes it
            del sys.modules[name[:-3]]
    info = folder / "page-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: page\nVersion: 1.0\n")
    entries = [f"[{group}]\n{lines}" for group, lines in _ENTRIES.findall(files["pyproject.toml"])]
    (info / "entry_points.txt").write_text("\n".join(entries).replace('"', ""))
    patch.syspath_prepend(str(folder))
    patch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{ROOT}")
