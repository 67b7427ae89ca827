"""Files and folders: written whole or not at all, and an error that names the path."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qaware.errors import QawareError
from qaware.files import atomic, replace, require_writable, sha256, size, write_json, write_text


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


def fill(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True)
    for name, text in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return folder


def test_a_folder_replaces_a_folder(tmp_path: Path) -> None:
    path = fill(tmp_path / "model.mlx", old="1")
    with atomic(path) as temporary:
        fill(temporary, new="2", sub__part="3")
        assert (path / "old").read_text() == "1"
    assert [p.name for p in tmp_path.iterdir()] == ["model.mlx"]
    assert sorted(p.name for p in path.rglob("*")) == ["new", "part", "sub"]


def test_a_failure_leaves_the_old_folder_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = fill(tmp_path / "model.mlx", old="1")

    def fail(temporary: Path) -> None:
        fill(temporary, half="2", sub__part="3")
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"), atomic(path) as temporary:
        fail(temporary)
    real = os.rename

    def full(source: Path, target: Path) -> None:
        if Path(target) == path and "-old-" not in Path(source).name:
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(QawareError, match="No space left on device"), atomic(path) as temporary:
        fill(temporary, new="2")
    assert [p.name for p in tmp_path.iterdir()] == ["model.mlx"]
    assert (path / "old").read_text() == "1"


@pytest.mark.parametrize("folder", [True, False])
def test_a_killed_writer_of_a_folder_leaves_the_old_one_or_none(tmp_path: Path, folder: bool) -> None:
    path = tmp_path / "model.mlx"
    if folder:
        fill(path, old="1")
    code = (
        "import os, signal, pathlib, sys; from qaware.files import atomic\n"
        "with atomic(pathlib.Path(sys.argv[1])) as t:\n"
        "    t.mkdir(); (t / 'half').write_text('x'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == -9
    assert [p.name for p in path.iterdir()] == ["old"] if folder else not path.exists()


def test_what_a_killed_process_of_the_same_id_left_is_no_obstacle(tmp_path: Path) -> None:
    path = fill(tmp_path / "model.mlx", old="1")
    for left in (f".{os.getpid()}-model.mlx", f".{os.getpid()}-old-model.mlx"):
        fill(tmp_path / left, half="x")
    with atomic(path) as temporary:
        fill(temporary, new="2")
    assert [p.name for p in tmp_path.iterdir()] == ["model.mlx"]
    assert [p.name for p in path.iterdir()] == ["new"]


def test_a_file_and_a_folder_do_not_replace_each_other(tmp_path: Path) -> None:
    folder, file = fill(tmp_path / "folder", old="1"), tmp_path / "file"
    file.write_text("old")
    with pytest.raises(QawareError, match=r"folder: cannot be written \(Is a directory\)"):
        write_text(folder, "new")
    with (
        pytest.raises(QawareError, match=r"file: cannot be written \(Not a directory\)"),
        atomic(file) as new,
    ):
        fill(new, new="1")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "folder", "old"]
    assert file.read_text() == "old"


def test_a_link_to_a_folder_is_not_emptied(tmp_path: Path) -> None:
    elsewhere = fill(tmp_path / "elsewhere", kept="1")
    (tmp_path / "model.mlx").symlink_to(elsewhere)
    with pytest.raises(QawareError, match="cannot be written"), atomic(tmp_path / "model.mlx") as temporary:
        fill(temporary, new="2")
    replace(fill(tmp_path / "new", a="1"), fill(tmp_path / "target", b="1"))
    assert (elsewhere / "kept").read_text() == "1"
    assert [p.name for p in (tmp_path / "target").iterdir()] == ["a"]


def test_sha256_of_a_folder_is_of_its_names_and_contents(tmp_path: Path) -> None:
    made = fill(tmp_path / "a", one="1", sub__two="22")
    found = {sha256(made)}
    assert sha256(fill(tmp_path / "b", sub__two="22", one="1")) in found
    for index, files in enumerate(
        [
            {"one": "1"},
            {"one": "1", "two": "22"},
            {"one": "12", "sub__two": "2"},
            {"one": "22", "sub__two": "1"},
        ]
    ):
        found.add(sha256(fill(tmp_path / str(index), **files)))
    assert len(found) == 5
    (made / "more").write_text("")
    assert sha256(made) not in found


def test_links_in_a_folder_are_not_followed(tmp_path: Path) -> None:
    made, other = fill(tmp_path / "a", one="1", two="22"), fill(tmp_path / "other", two="22", big="x" * 100)
    before = sha256(made)
    (made / "two").unlink()
    (made / "two").symlink_to(other / "two")
    assert sha256(made) != before
    (made / "folder").symlink_to(other)
    (made / "nowhere").symlink_to("nothing")
    linked = sha256(made)
    (other / "big").write_text("y")
    assert sha256(made) == linked
    assert size(made) == 1


def test_size_counts_every_file(tmp_path: Path) -> None:
    assert size(fill(tmp_path / "a", one="1", sub__two="22")) == 3
    assert size(tmp_path / "a" / "sub" / "two") == 2
