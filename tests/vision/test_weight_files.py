"""Weights from files: prefixes, old files, and everything that does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from qaware.errors import QawareError
from qaware.vision.checkpoints import load_weights


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))


@pytest.mark.parametrize("prefix", ["", "module.", "network."])
@pytest.mark.parametrize("wrapped", [False, True])
def test_prefixes_and_wrapping(tmp_path: Path, prefix: str, wrapped: bool) -> None:
    source, target = network(), network()
    state = {prefix + key: value for key, value in source.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3} if wrapped else state, tmp_path / "w.pt")
    load_weights(target, tmp_path / "w.pt")
    assert torch.equal(target[0].weight, source[0].weight)  # type: ignore[index]


def test_files_of_old_torch_count_no_batches(tmp_path: Path) -> None:
    state = {k: v for k, v in network().state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(dict(state), tmp_path / "w.pt")
    load_weights(network(), tmp_path / "w.pt")


def test_keys_and_shapes_must_fit(tmp_path: Path) -> None:
    state = dict(network().state_dict())
    del state["0.bias"]
    state |= {"fc.weight": torch.zeros(1), "1.bias": torch.zeros(5)}
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(QawareError) as error:
        load_weights(network(), tmp_path / "w.pt")
    for part in (
        "does not fit Sequential",
        "missing: 0.bias",
        "unexpected: fc.weight",
        "of another shape: 1.bias (5,) for (2,)",
    ):
        assert part in str(error.value)


def test_many_keys_are_counted(tmp_path: Path) -> None:
    torch.save({f"k{i}": torch.zeros(1) for i in range(9)}, tmp_path / "w.pt")
    with pytest.raises(QawareError, match="unexpected: k0, k1, k2, k3, k4 and 4 more"):
        load_weights(network(), tmp_path / "w.pt")


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("this ran",)


def test_no_code_of_a_file_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": Evil()}, tmp_path / "w.pt")
    with pytest.raises(QawareError, match="is not a file of weights that is safe to load"):
        load_weights(network(), tmp_path / "w.pt")
    assert "this ran" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [{}, {"state_dict": {}}, [1, 2], {"epoch": 3}])
def test_no_state_dict(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(QawareError, match="holds no state_dict"):
        load_weights(network(), tmp_path / "w.pt")


def test_no_file_and_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(QawareError, match=r"missing.pt cannot be read \(No such file"):
        load_weights(network(), tmp_path / "missing.pt")
    (tmp_path / "w.pt").write_bytes(b"something else")
    with pytest.raises(QawareError, match="is not a file of weights"):
        load_weights(network(), tmp_path / "w.pt")
