"""The rounding methods by name."""

from __future__ import annotations

from qaware.rounding import awq, gptq, hqq, mse, percentile, q4_0, registered, rtn, smoothquant
from qaware.rounding.base import Chooser, Folder

CHOOSERS: dict[str, Chooser] = {
    "rtn": rtn.choose,
    "mse": mse.choose,
    "percentile": percentile.choose,
    "q4-0": q4_0.choose,
    "hqq": hqq.choose,
    "gptq": gptq.choose,
}
FOLDERS: dict[str, Folder] = {"awq": awq.fold, "smoothquant": smoothquant.fold}


def chooser_of(name: str) -> Chooser:
    """That of a step that chooses integers, one of ours or a user's."""
    return CHOOSERS.get(name, registered.choose)
