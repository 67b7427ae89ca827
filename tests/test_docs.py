"""The Python of the pages in docs/ runs, block after block."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ALL = sorted((Path(__file__).parents[1] / "docs").glob("*.md"))
# Those hold a package, and have tests of their own that install and run it.
PAGES = [page for page in ALL if not page.stem.startswith("add-a-")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scope: dict = {"__name__": page.stem}
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, page.name, "exec"), scope)
