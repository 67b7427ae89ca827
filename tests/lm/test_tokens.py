"""Making, loading and telling apart tokenizers; ids and bytes of documents."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, normalizers, pre_tokenizers

from qaware.errors import QawareError
from qaware.lm import tokens
from qaware.lm.documents import PYTHON_DOCS, read_documents

from .stories import ODD


def test_a_trained_tokenizer_knows_every_byte() -> None:
    documents = read_documents(PYTHON_DOCS, limit=8)
    tokenizer = tokens.train_tokenizer(documents, 300)
    assert len(tokenizer) == 300
    assert tokenizer.convert_ids_to_tokens([0, 1]) == [tokens.BOS, tokens.EOS]
    assert (tokenizer.bos_token, tokenizer.eos_token) == (tokens.BOS, tokens.EOS)
    every = "".join(map(chr, range(0x250))) + ODD
    ((ids, used),) = tokens.encode(tokenizer, [every])
    assert tokenizer.decode(ids) == every
    assert used.sum() == len(every.encode())
    again = tokens.train_tokenizer(documents, 300)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_tokenizers_load_from_a_folder_and_from_a_file(tmp_path: Path) -> None:
    made = tokens.train_tokenizer(["hello there"], 260)
    made.save_pretrained(tmp_path / "both")
    bare = tmp_path / "bare.json"
    made.backend_tokenizer.save(str(bare))
    for name in (tmp_path / "both", tmp_path / "both" / "tokenizer.json", bare):
        found = tokens.load_tokenizer(str(name))
        assert (found.bos_token, found.eos_token, len(found)) == (tokens.BOS, tokens.EOS, 260)


def test_hashes_tell_tokenizers_apart_by_their_files(tmp_path: Path) -> None:
    assert len({tokens.tokenizer_hash(t) for t in (300, 301, "300", "hub/a")}) == 4
    made = tokens.train_tokenizer(["hello there"], 260)
    made.save_pretrained(tmp_path / "a")
    made.save_pretrained(tmp_path / "b")
    before = tokens.tokenizer_hash(str(tmp_path / "a"))
    assert tokens.tokenizer_hash(str(tmp_path / "b" / "tokenizer.json")) == before
    (tmp_path / "b" / "tokenizer_config.json").write_text("{}")
    assert tokens.tokenizer_hash(str(tmp_path / "b")) != before


def test_a_bare_tokenizer_has_nothing_to_do_with_the_files_beside_it(tmp_path: Path) -> None:
    bare = tmp_path / "bare.json"
    tokens.train_tokenizer(["hello there"], 260).backend_tokenizer.save(str(bare))
    before = tokens.tokenizer_hash(str(bare))
    (tmp_path / "stories.txt").write_text("hello")
    assert tokens.tokenizer_hash(str(bare)) == before
    tokens.train_tokenizer(["hello there"], 259).backend_tokenizer.save(str(bare))
    assert tokens.tokenizer_hash(str(bare)) != before


def test_special_tokens_stand_around_documents_and_for_no_bytes() -> None:
    made = tokens.train_tokenizer(["hello there"], 260)
    plain = list(tokens.encode(made, ["hello", "there"]))
    framed = list(tokens.encode(made, ["hello", "there"], [7, 8], [9]))
    for (ids, used), (more_ids, more_used) in zip(plain, framed, strict=True):
        assert more_ids.tolist() == [7, 8, *ids, 9]
        assert more_used.tolist() == [0, 0, *used, 0]
        assert more_ids.dtype == more_used.dtype == "int32"


@pytest.mark.usefixtures("offline")
def test_tokenizers_that_cannot_be_loaded(tmp_path: Path) -> None:
    broken = tmp_path / "tokenizer.json"
    broken.write_text("{}")
    for name in (str(broken), str(tmp_path), "nobody/nothing"):
        with pytest.raises(
            QawareError, match=r"could not be loaded from a folder, a tokenizer\.json"
        ) as caught:
            tokens.load_tokenizer(name)
        assert "\n" not in str(caught.value)


def test_bytes_add_up_whatever_the_tokenizer_drops(tmp_path: Path) -> None:
    backend = Tokenizer.from_str(tokens.train_tokenizer(["hello"], 258).backend_tokenizer.to_str())
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Strip()])
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer = tokens._wrap(backend)
    documents = [f"  {ODD}  ", "ﬁne", "x", "   "]
    for document, (ids, used) in zip(documents, tokens.encode(tokenizer, documents, chunk=3), strict=True):
        assert ids.shape == used.shape
        assert (used >= 0).all()
        assert used.sum() == (len(document.encode()) if len(ids) else 0)
