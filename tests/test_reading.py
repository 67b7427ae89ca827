"""Plain data from files: what is read, and one line about what is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qaware.errors import QawareError
from qaware.reading import parse_json, read_json, read_yaml


def test_what_is_written_is_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_text('{"a": [1, "ü"]}', encoding="utf-8")
    assert read_json(tmp_path / "a") == read_yaml(tmp_path / "a") == {"a": [1, "ü"]}
    assert parse_json("[]", "here") == []


@pytest.mark.parametrize("read", [read_json, read_yaml])
@pytest.mark.parametrize("content", [b"\xff\xfe\xff", b'{"a": [', None])
def test_another_file_is_named_in_one_line(
    tmp_path: Path, read: Callable[[Path], Any], content: bytes | None
) -> None:
    if content is not None:
        (tmp_path / "a").write_bytes(content)
    with pytest.raises(QawareError, match=r"a: (is not valid|cannot be read)") as caught:
        read(tmp_path / "a")
    assert "\n" not in str(caught.value)
