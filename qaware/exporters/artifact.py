"""An exported file or folder together with what made it, kept beside it as JSON."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qaware import machine
from qaware.errors import QawareError
from qaware.exporters.signature import Signature
from qaware.files import sha256, write_json


@dataclass(frozen=True)
class Artifact:
    """A file, or a folder of files, for one runtime and its sidecar ``<name>.json``."""

    path: Path
    runtime: str
    signature: Signature
    recipe: dict[str, Any]
    """The recipe's plain data, with its ``hash``."""
    layers: dict[str, str]
    """Scheme of each quantized layer, e.g. ``{"lm_head": "int4 g32 + int8-dynamic"}``."""
    sha256: str
    bytes: int
    versions: dict[str, str] = field(default_factory=machine.versions)
    cpu: dict[str, Any] = field(default_factory=machine.cpu)
    parity: dict[str, Any] | None = None
    """What the parity check measured; None until it passed."""
    notes: tuple[str, ...] = ()
    """What this runtime does differently, e.g. ``activations in float``."""
    details: dict[str, Any] = field(default_factory=dict)
    """What the exporter found while it wrote the file, e.g. ``{"delegation": {...}}``."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """Anything else that scoring needs, e.g. the tokenizer's folder."""

    @property
    def sidecar(self) -> Path:
        """Path of the JSON beside the file or folder."""
        return sidecar_path(self.path)

    def save(self) -> None:
        """Write the sidecar, atomically."""
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "path"}
        write_json(self.sidecar, {**data, "signature": self.signature.to_dict(), "notes": list(self.notes)})

    def update(self, **changes: Any) -> Artifact:
        """A copy with ``changes``, saved."""
        new = dataclasses.replace(self, **changes)
        new.save()
        return new

    @classmethod
    def open(cls, path: str | Path) -> Artifact:
        """Read the sidecar and check the file, or every file of the folder, against it.

        The digest finds damage and mix-ups. It is no protection from somebody who can write both files.

        Raises:
            QawareError: file or sidecar missing or unreadable, or the file is not the one it describes.
        """
        path = Path(path)
        if not path.is_file() and not is_artifact_folder(path):
            what = f" (a folder without {path.name}.json beside it)" if path.is_dir() else ""
            raise QawareError(f"{path}: no such artifact{what}")
        data = _read(sidecar_path(path))
        found = sha256(path)
        if found != data["sha256"]:
            raise QawareError(
                f"{path}: is damaged or was changed (sha256 {found[:12]}, its sidecar says "
                f"{str(data['sha256'])[:12]}); export it again"
            )
        return cls(path=path, **data)


def sidecar_path(path: Path) -> Path:
    """``model.pte`` to ``model.pte.json``."""
    return path.with_name(path.name + ".json")


def is_artifact_folder(path: Path) -> bool:
    """Whether it is a folder with a sidecar beside it."""
    return path.is_dir() and bool(path.name) and sidecar_path(path).is_file()


def _read(sidecar: Path) -> dict[str, Any]:
    known = {f.name for f in dataclasses.fields(Artifact)} - {"path"}
    try:
        data: dict[str, Any] = json.loads(sidecar.read_text(encoding="utf-8"))
    except OSError as error:
        raise QawareError(
            f"{sidecar}: cannot be read ({error.strerror}); export the artifact again"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise QawareError(f"{sidecar}: is not valid JSON ({error}); export the artifact again") from error
    try:
        if set(data) != known:
            raise KeyError(*(set(data) ^ known))
        return {**data, "signature": Signature.from_dict(data["signature"]), "notes": tuple(data["notes"])}
    except (KeyError, TypeError, IndexError) as error:
        raise QawareError(
            f"{sidecar}: is not a sidecar of this version; export the artifact again"
        ) from error
