"""What lies beside an artifact, so that it can be scored and can generate without the data module."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from qaware.callbacks.carried import carry_inputs


class Text:
    """Saves a tokenizer."""

    hparams: dict[str, Any] = {"bos": False, "block_size": 8, "source": ["a list is not plain"]}  # noqa: RUF012

    def save_tokenizer(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "tokenizer.json").write_text("{}")


def test_a_tokenizer_is_copied_and_plain_options_kept(tmp_path: Path) -> None:
    found = carry_inputs(Text(), tmp_path / "artifacts")
    assert found == {"tokenizer": "tokenizer", "data": {"bos": False, "block_size": 8}}
    assert (tmp_path / "artifacts" / "tokenizer" / "tokenizer.json").is_file()


def test_given_arguments_win(tmp_path: Path) -> None:
    assert carry_inputs(Text(), tmp_path / "artifacts", {"bos": True})["data"] == {"bos": True}


def test_images_say_how_they_were_prepared(tmp_path: Path) -> None:
    data = SimpleNamespace(preprocessing=lambda: {"size": 8}, hparams={"split": "test"})
    assert carry_inputs(data, tmp_path) == {"preprocessing": {"size": 8}, "data": {"split": "test"}}
    assert not list(tmp_path.iterdir())


def test_other_data_carry_nothing(tmp_path: Path) -> None:
    assert carry_inputs(None, tmp_path) == {}
    assert carry_inputs(object(), tmp_path) == {}
