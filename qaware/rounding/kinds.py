"""The rounding methods by name."""

from __future__ import annotations

from qaware.rounding import awq, gptq, hqq, mse, percentile, rtn, smoothquant
from qaware.rounding.base import Chooser, Folder

CHOOSERS: dict[str, Chooser] = {
    "rtn": rtn.choose,
    "mse": mse.choose,
    "percentile": percentile.choose,
    "hqq": hqq.choose,
    "gptq": gptq.choose,
}
FOLDERS: dict[str, Folder] = {"awq": awq.fold, "smoothquant": smoothquant.fold}
