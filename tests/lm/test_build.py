"""Models from settings, from folders and from a hub that is away."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch

from qaware.errors import QawareError
from qaware.lm.build import from_config, from_weights, settings

from .tiny_llama import GPT2, LLAMA, MISTRAL, make, saved, tokens


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {**LLAMA, "hiden_size": 3},
            r"model\.hiden_size: 'llama' has no such setting; did you mean hidden_size",
        ),
        ({**LLAMA, "model_type": "lama"}, "'lama' is no causal LM of transformers; did you mean llama"),
        ({"hidden_size": 3}, "model_type: None"),
        ({**LLAMA, "hidden_size": "wide"}, "expected int, got str"),
        ({**LLAMA, "num_attention_heads": 3}, "not a multiple of the number of attention heads"),
    ],
)
def test_wrong_configurations(config: dict[str, Any], message: str) -> None:
    with pytest.raises(QawareError, match=message) as caught:
        from_config(config)
    assert "\n" not in str(caught.value)


def test_aliases_of_settings_are_known() -> None:
    assert from_config({**GPT2, "hidden_size": 32}).config.n_embd == 32
    assert from_config({**LLAMA, "rope_theta": 500.0}).config.rope_parameters["rope_theta"] == 500.0


def test_small_vocabularies_are_built_in_silence(capfd: pytest.CaptureFixture[str]) -> None:
    from_config(GPT2)
    assert capfd.readouterr() == ("", "")


def test_a_local_folder_is_loaded_as_it_was_saved(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = saved(tmp_path)
    capfd.readouterr()
    model = from_weights(folder)
    assert capfd.readouterr() == ("", "")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, make().eval()(tokens()))


def test_settings_build_the_same_architecture() -> None:
    for config in (LLAMA, GPT2, MISTRAL):
        model = from_config(config)
        again = from_config(settings(model.config))
        assert again.config.to_dict() == model.config.to_dict()


def test_folders_that_cannot_be_loaded(tmp_path: Path) -> None:
    folder = Path(saved(tmp_path))
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"num_hidden_layers": 3}))
    with pytest.raises(QawareError, match=r"has no weights for model\.layers\.2"):
        from_weights(str(folder))
    (folder / "model.safetensors").unlink()
    torch.save(make().model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(QawareError, match=r"could not be loaded from this folder .*safetensors"):
        from_weights(str(folder))


@pytest.mark.usefixtures("offline")
def test_an_unreachable_hub_is_said_in_one_line() -> None:
    with pytest.raises(QawareError, match="'nobody/nothing' could not be loaded from the hub") as caught:
        from_weights("nobody/nothing")
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is not None


@pytest.mark.usefixtures("absent_hub")
def test_what_the_hub_gave_before_is_loaded_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    kept = tmp_path / "models--some--where"
    saved(kept / "snapshots" / ("0" * 40))
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("0" * 40)
    with torch.no_grad():
        assert torch.equal(from_weights("some/where")(tokens()).logits, make().eval()(tokens()))
