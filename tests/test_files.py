"""Files: written whole or not at all, and an error that names the path."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from qaware.errors import QawareError
from qaware.files import atomic, require_writable, sha256, write_json, write_text


def test_a_file_that_could_not_be_written_is_refused_before(tmp_path: Path) -> None:
    require_writable(tmp_path / "new" / "a.txt")
    assert list((tmp_path / "new").iterdir()) == []
    with pytest.raises(QawareError, match="is a folder"):
        require_writable(tmp_path / "new")
    (tmp_path / "file").write_text("")
    with pytest.raises(QawareError, match="cannot be written"):
        require_writable(tmp_path / "file" / "a.txt")


def test_text_and_json_arrive_in_a_new_folder(tmp_path: Path) -> None:
    write_text(tmp_path / "a" / "b" / "c.txt", "Grüße ±\n")
    write_json(tmp_path / "a" / "d.json", {"x": [1, 2.5, None, "ü"]})
    assert (tmp_path / "a" / "b" / "c.txt").read_bytes() == "Grüße ±\n".encode()
    assert json.loads((tmp_path / "a" / "d.json").read_text()) == {"x": [1, 2.5, None, "ü"]}


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    write_text(path, "old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half of the new")
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"), atomic(path) as temporary:
        fail(temporary)
    assert [p.name for p in tmp_path.iterdir()] == ["model.bin"]
    assert path.read_text() == "old"


def test_the_temporary_name_is_beside_the_file_and_keeps_its_suffix(tmp_path: Path) -> None:
    with atomic(tmp_path / "model.pt2") as temporary:
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".pt2"
        assert not (tmp_path / "model.pt2").exists()
        temporary.write_text("x")
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt2"]


def test_a_reader_of_the_old_file_is_not_disturbed(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    write_text(path, "old")
    with path.open() as reader:
        write_text(path, "new")
        assert reader.read() == "old"
    assert path.read_text() == "new"


def test_a_killed_writer_leaves_no_file_of_that_name(tmp_path: Path) -> None:
    code = (
        "import os, signal, pathlib, sys; from qaware.files import atomic\n"
        "with atomic(pathlib.Path(sys.argv[1])) as t:\n"
        "    t.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    path = tmp_path / "model.bin"
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == -9
    assert not path.exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("file/x.json", "File exists"),
        ("file/sub/x.json", "Not a directory"),
        ("n" * 300, "File name too long"),
    ],
)
def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "file").write_text("I am not a folder")
    with pytest.raises(QawareError) as caught:
        write_text(tmp_path / name, "x")
    assert str(caught.value).startswith(str(tmp_path / name))
    assert f"cannot be written ({words})" in str(caught.value)


def test_a_full_disk_is_a_qaware_error(tmp_path: Path) -> None:
    def fill(temporary: Path) -> None:
        temporary.symlink_to("/dev/full")
        temporary.write_text("x")

    with pytest.raises(QawareError, match="No space left on device"), atomic(tmp_path / "x") as temporary:
        fill(temporary)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_json_writes_nothing(tmp_path: Path) -> None:
    for value in (float("nan"), {"x": object()}):
        with pytest.raises((ValueError, TypeError)):
            write_json(tmp_path / "x.json", value)
    assert list(tmp_path.iterdir()) == []


def test_sha256_of_more_than_one_chunk(tmp_path: Path) -> None:
    data = bytes(range(256)) * 5000
    (tmp_path / "x").write_bytes(data)
    assert sha256(tmp_path / "x") == hashlib.sha256(data).hexdigest()
