"""Artifact: the sidecar round-trips, and a file that is not the one it describes is never opened."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from qaware import machine
from qaware.errors import QawareError
from qaware.exporters.artifact import Artifact, sidecar_path
from qaware.exporters.signature import Signature, TensorSpec
from qaware.files import sha256

SIGNATURE = Signature((TensorSpec("ids", "int64", (1, "seq"), 0, 9, "ids"),), {"seq": (1, 8)})


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    path = tmp_path / "model.bin"
    path.write_bytes(b"0123456789" * 10)
    made = Artifact(
        path=path,
        runtime="echo",
        signature=SIGNATURE,
        recipe={"name": "r", "hash": "0" * 16, "rules": []},
        layers={"head": "int4 g32"},
        sha256=sha256(path),
        bytes=100,
        notes=("one", "two"),
        metadata={"tokenizer": "tok", "data": {"bos": True}},
    )
    made.save()
    return made


def test_it_opens_as_it_was_saved(artifact: Artifact) -> None:
    assert artifact.sidecar.name == "model.bin.json"
    assert Artifact.open(artifact.path) == artifact
    assert Artifact.open(str(artifact.path)) == artifact
    assert artifact.versions == machine.versions()
    assert artifact.cpu == machine.cpu()


def test_the_sidecar_is_plain_and_has_no_path(artifact: Artifact) -> None:
    data = json.loads(artifact.sidecar.read_text())
    assert "path" not in data
    assert str(artifact.path.parent) not in artifact.sidecar.read_text()


def test_both_files_can_move(artifact: Artifact, tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    for file in (artifact.path, artifact.sidecar):
        file.rename(folder / file.name)
    assert Artifact.open(folder / "model.bin").sha256 == artifact.sha256


def test_update_is_saved(artifact: Artifact) -> None:
    updated = artifact.update(parity={"relative": 1e-6})
    assert artifact.parity is None
    assert Artifact.open(artifact.path) == updated
    assert updated.parity == {"relative": 1e-6}


def test_every_changed_byte_is_found(artifact: Artifact) -> None:
    content = bytearray(artifact.path.read_bytes())
    for position in (0, 50, 99):
        content[position] ^= 1
        artifact.path.write_bytes(content)
        with pytest.raises(
            QawareError, match=r"model\.bin: is damaged or was changed \(sha256 .*; export it again"
        ):
            Artifact.open(artifact.path)
        content[position] ^= 1
    artifact.path.write_bytes(content)
    Artifact.open(artifact.path)


@pytest.mark.parametrize("content", [b"", b"0123456789" * 9])
def test_a_file_cut_short_is_found(artifact: Artifact, content: bytes) -> None:
    artifact.path.write_bytes(content)
    with pytest.raises(QawareError, match="damaged"):
        Artifact.open(artifact.path)


def test_missing_files_are_named(artifact: Artifact, tmp_path: Path) -> None:
    with pytest.raises(QawareError, match=r"other\.bin: no such artifact"):
        Artifact.open(tmp_path / "other.bin")
    for folder in (tmp_path, Path("."), Path("/")):
        with pytest.raises(QawareError, match=r"no such artifact.*without .*json beside it"):
            Artifact.open(folder)
    artifact.sidecar.unlink()
    with pytest.raises(
        QawareError, match=r"model\.bin\.json: cannot be read \(No such file.*export the artifact again"
    ):
        Artifact.open(artifact.path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b'{"sha256": '])
def test_a_broken_sidecar_is_named(artifact: Artifact, content: bytes) -> None:
    artifact.sidecar.write_bytes(content)
    with pytest.raises(QawareError, match=r"model\.bin\.json: is not valid JSON"):
        Artifact.open(artifact.path)


@pytest.mark.parametrize("content", ["[]", "3", "null", "{}", '"text"'])
def test_json_that_is_no_sidecar_is_named(artifact: Artifact, content: str) -> None:
    artifact.sidecar.write_text(content)
    with pytest.raises(QawareError, match=r"model\.bin\.json: is not a sidecar of this version"):
        Artifact.open(artifact.path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("signature", {}),
        ("signature", None),
        ("signature", {"inputs": [{"name": "x"}], "symbols": {}}),
        ("signature", {"inputs": [], "symbols": {"seq": [1]}}),
        ("notes", None),
        ("unheard_of", 1),
    ],
)
def test_a_sidecar_of_another_form_is_named(artifact: Artifact, key: str, value: object) -> None:
    data = json.loads(artifact.sidecar.read_text())
    artifact.sidecar.write_text(json.dumps({**data, key: value}))
    with pytest.raises(QawareError, match="is not a sidecar of this version; export the artifact again"):
        Artifact.open(artifact.path)


def test_a_sidecar_without_a_field_is_named(artifact: Artifact) -> None:
    data = json.loads(artifact.sidecar.read_text())
    for key in data:
        artifact.sidecar.write_text(json.dumps({k: v for k, v in data.items() if k != key}))
        with pytest.raises(QawareError, match="is not a sidecar of this version"):
            Artifact.open(artifact.path)


def test_sidecar_path_keeps_the_suffix() -> None:
    assert sidecar_path(Path("a/model.tar.gz")) == Path("a/model.tar.gz.json")


def test_an_artifact_does_not_change(artifact: Artifact) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        artifact.bytes = 1  # type: ignore[misc]


def test_a_folder_is_opened_as_a_whole(artifact: Artifact, tmp_path: Path) -> None:
    folder = tmp_path / "model.parts"
    (folder / "sub").mkdir(parents=True)
    (folder / "one").write_bytes(b"1")
    (folder / "sub" / "two").write_bytes(b"22")
    made = dataclasses.replace(artifact, path=folder, sha256=sha256(folder))
    made.save()
    assert made.sidecar == tmp_path / "model.parts.json"
    assert Artifact.open(folder) == made
    for damage in (
        lambda: (folder / "sub" / "two").write_bytes(b"23"),
        lambda: (folder / "more").write_bytes(b""),
        lambda: (folder / "one").unlink(),
    ):
        damage()
        with pytest.raises(QawareError, match=r"model\.parts: is damaged or was changed"):
            Artifact.open(folder)
