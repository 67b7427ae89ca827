"""TextDataModule: what is trained on, what is scored, what is cached; in real Trainers."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import datasets
import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from qaware.errors import QawareError
from qaware.files import sha256
from qaware.lm import CausalLM, TextDataModule, documents, tokens

from .stories import SEPARATOR, STORIES


def spell(data: TextDataModule, ids: torch.Tensor) -> str:
    return str(data.tokenizer_obj.decode(ids))


def test_packed_windows_are_the_text_in_order(make: Any) -> None:
    data = make()
    windows = data.windows()
    assert [len(ids) for ids in windows.ids[:-1]] == [16] * (len(windows.ids) - 1)
    assert 2 <= len(windows.ids[-1]) <= 16
    assert spell(data, torch.cat(windows.ids)) == "".join(f"<|bos|>{s}<|eos|>" for s in STORIES[-4:])
    assert (windows.window, windows.stride, windows.bos, set(windows.first)) == (16, 16, False, {1})
    seen = torch.cat([data._train[i] for i in range(len(data._train))])
    joined = "".join(f"<|bos|>{s}<|eos|>" for s in STORIES[:-4])
    assert len(seen) % 16 == 0
    assert joined.startswith(spell(data, seen))
    assert len(joined) - len(spell(data, seen)) < 100


def test_documents_are_windows_with_bos_first_and_are_cut(make: Any) -> None:
    data = make(layout="documents", block_size=12)
    windows = data.windows()
    whole = [data.tokenizer_obj.encode(s) for s in STORIES[-4:]]
    assert [ids.tolist() for ids in windows.ids] == [[0, *ids][:12] for ids in whole]
    assert (windows.window, windows.stride, windows.bos) == (12, 12, True)
    lengths = [data.tokenizer_obj.decode(ids[1:]).encode() for ids in windows.ids]
    assert windows.bytes == sum(map(len, lengths))


@pytest.mark.parametrize("layout", ["packed", "documents"])
def test_bytes_are_those_of_the_scored_tokens(make: Any, layout: str) -> None:
    windows = make(layout=layout, bos=False).windows()
    data = make(layout=layout, bos=False)
    scored = [data.tokenizer_obj.decode(ids[1:], skip_special_tokens=True) for ids in windows.ids]
    assert windows.bytes == sum(len(part.encode()) for part in scored)


def test_batches_of_documents_are_padded_for_training_only(make: Any) -> None:
    data = make(layout="documents", block_size=64)
    batch = next(iter(data.train_dataloader()))
    ids, labels = batch["input_ids"], batch["labels"]
    kept = labels != -100
    assert ids.shape == labels.shape
    assert not kept.all()
    assert torch.equal(ids[kept], labels[kept])
    assert (kept.long().diff(dim=1) <= 0).all()  # the filling is at the end
    rows = [row for batch in data.val_dataloader() for row in batch["input_ids"]]
    expected = sorted(ids.tolist() for ids in data.windows().ids)
    assert sorted(row.tolist() for row in rows) == expected
    assert {batch.keys() == {"input_ids"} for batch in data.val_dataloader()} == {True}


def test_packed_batches(make: Any) -> None:
    data = make()
    shapes = [tuple(batch["input_ids"].shape) for batch in data.train_dataloader()]
    assert shapes[0] == (4, 16)
    assert sum(rows for rows, _ in shapes) == len(data._train)
    assert next(iter(data.train_dataloader()))["input_ids"].dtype == torch.int64
    assert sum(len(batch["input_ids"]) for batch in data.val_dataloader()) == len(data.windows().ids)


def test_the_order_follows_the_seed_and_the_epoch(make: Any) -> None:
    def order(seed: int, epoch: int) -> list[Any]:
        loader = make(seed=seed).train_dataloader()
        loader.sampler.set_epoch(epoch)
        return torch.cat([batch["input_ids"] for batch in loader]).tolist()

    assert order(0, 1) == order(0, 1) != order(0, 0) != order(1, 0)
    assert sorted(order(0, 1)) == sorted(order(0, 0))


def test_the_last_documents_are_held_out_and_never_trained_on(make: Any) -> None:
    assert make(val_fraction=0.25)._texts() == (STORIES[:30], STORIES[30:])
    whole = SEPARATOR.join(STORIES)
    assert make(separator=None, val_fraction=0.2)._texts() == documents.hold_out([whole], 0.2)


def test_validation_text_of_its_own(make: Any, tmp_path: Path) -> None:
    (tmp_path / "val.jsonl").write_text('{"text": "a first one"}\n{"text": "another"}\n{"text": "third"}\n')
    data = make(val_source=str(tmp_path / "val.jsonl"), layout="documents", max_val_windows=2)
    assert [spell(data, ids[1:]) for ids in data.windows().ids] == ["a first one", "another"]
    assert data._texts()[0] == STORIES
    assert len(make(max_documents=7)._texts()[0]) == 6


@pytest.mark.usefixtures("offline")
def test_hub_text_is_validated_on_its_split(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, config: str | None, split: str) -> datasets.Dataset:
        assert (name, config) == ("some/where", "small")
        return datasets.Dataset.from_dict({"text": STORIES if split == "train" else ["held out text"]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    data = make("some/where", config="small")
    assert data._texts() == (STORIES, ["held out text"])
    assert len(data.windows().ids) == 1


def test_text_is_read_and_tokenized_once(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make()
    first.prepare_data()
    first.setup("fit")
    opened = first._train
    monkeypatch.setattr(documents, "read_documents", lambda *_, **__: pytest.fail("read twice"))
    first.prepare_data()
    first.setup("validate")
    assert first._train is opened
    other = make(block_size=8, batch_size=2, max_val_windows=3, num_workers=1)
    assert other.folder == first.folder  # these change no token
    assert other.fingerprint != first.fingerprint
    assert isinstance(other._train.stream.ids, np.memmap)
    assert sorted(p.name for p in first.folder.iterdir()) == ["tokenizer", "train", "val"]
    assert list(first.folder.parent.iterdir()) == [first.folder]


def test_the_tokenizer_can_be_kept_beside_artifacts(make: Any, tmp_path: Path) -> None:
    data = make()
    assert data.vocab_size == len(data.tokenizer_obj) == 300
    data.save_tokenizer(tmp_path / "artifacts")
    assert sha256(tmp_path / "artifacts" / "tokenizer.json") == data.windows().tokenizer
    other = make(tokenizer=str(tmp_path / "artifacts"))
    assert other.windows().protocol() == data.windows().protocol()
    shutil.rmtree(tmp_path / "artifacts")
    assert other.vocab_size == 300


def test_one_token_for_both_ends_stands_once(make: Any, tmp_path: Path) -> None:
    tokenizer = tokens.train_tokenizer(STORIES, 300)
    tokenizer.bos_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path / "gpt2like")
    data = make(tokenizer=str(tmp_path / "gpt2like"))
    assert spell(data, torch.cat(data.windows().ids)) == "".join(f"<|eos|>{s}" for s in STORIES[-4:])


def test_a_tokenizer_without_bos(make: Any, tmp_path: Path) -> None:
    tokenizer = tokens.train_tokenizer(STORIES, 300)
    tokenizer.bos_token = None
    tokenizer.save_pretrained(tmp_path / "nobos")
    with pytest.raises(QawareError, match=r"bos: tokenizer .*nobos' has no BOS token; set bos to false"):
        make(tokenizer=str(tmp_path / "nobos")).setup()
    ended = "".join(f"{s}<|eos|>" for s in STORIES[-4:])
    data = make(tokenizer=str(tmp_path / "nobos"), bos=False)
    assert spell(data, torch.cat(data.windows().ids)) == ended


def test_too_little_text_says_how_much_there_was(make: Any, tmp_path: Path) -> None:
    with pytest.raises(QawareError, match=r"\d{3} training tokens make 1 windows of 500, and at least 2"):
        make(block_size=500).setup()
    (tmp_path / "single.txt").write_text("w")
    single = make(layout="documents", bos=False, val_source=str(tmp_path / "single.txt"))
    for ask in (single.setup, lambda: single.setup("test"), single.windows, single.val_dataloader):
        with pytest.raises(QawareError, match="block_size: 1 validation tokens make 0 windows"):
            ask()


@pytest.mark.parametrize("layout", ["packed", "documents"])
def test_a_short_text_is_scored_with_a_tokenizer_at_hand(make: Any, tmp_path: Path, layout: str) -> None:
    make().save_tokenizer(tmp_path / "tokenizer")
    short = tmp_path / "short.txt"
    short.write_text("Once upon a time. The end.")
    given = {"tokenizer": str(tmp_path / "tokenizer"), "val_source": str(short), "max_val_windows": 5}
    data = make(str(short), layout=layout, block_size=512, separator=None, **given)
    data.prepare_data()
    data.setup("validate")
    assert [spell(data, ids).removesuffix("<|eos|>") for ids in data.windows().ids] == [
        "<|bos|>Once upon a time. The end."
    ]
    assert trainer(tmp_path).validate(tiny(n_positions=512), datamodule=data, verbose=False)
    for train in (data.setup, lambda: data.setup("fit"), data.train_dataloader):
        with pytest.raises(QawareError, match=r"training tokens make [01] windows of 512, and at least 2"):
            train()


def tiny(**changes: int) -> CausalLM:
    config = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
    return CausalLM({**config, "vocab_size": 300, **changes})


def trainer(folder: Path) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False}
    return pl.Trainer(default_root_dir=folder, max_epochs=1, accelerator="cpu", **quiet)


def test_a_trainer_uses_it_and_its_checkpoint_keeps_the_options(make: Any, tmp_path: Path) -> None:
    data, module, run = make(layout="documents"), tiny(), trainer(tmp_path)
    run.fit(module, datamodule=data)
    assert run.callback_metrics["val_loss"].isfinite()
    assert run.test(module, datamodule=data, verbose=False)[0]["test_loss"] > 0
    assert len(run.predict(module, datamodule=data) or []) == len(data.val_dataloader())
    run.save_checkpoint(tmp_path / "all.ckpt")
    saved = torch.load(tmp_path / "all.ckpt", weights_only=True)["datamodule_hyper_parameters"]
    assert TextDataModule(**saved).fingerprint == data.fingerprint
    with pytest.raises(QawareError, match="tokenizer has 300 tokens but the model only 299"):
        run.fit(tiny(vocab_size=299), datamodule=data)


def test_worker_processes_and_pickles_give_the_same_batches(
    make: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    data = make()
    expected = [batch["input_ids"].tolist() for batch in data.train_dataloader()]
    capfd.readouterr()
    found = [batch["input_ids"].tolist() for batch in make(num_workers=1).train_dataloader()]
    assert found == expected
    assert capfd.readouterr() == ("", "")
    again = pickle.loads(pickle.dumps(data))
    assert [batch["input_ids"].tolist() for batch in again.train_dataloader()] == expected
