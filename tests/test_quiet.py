"""Quiet: the named messages are dropped, every other one of the same source arrives."""

from __future__ import annotations

import logging
import subprocess
import sys
import warnings

import pytest

from qaware import quiet


@pytest.mark.parametrize(
    ("logger", "noise"),
    [
        ("torchao", "Failed to load /x/_C.so: no CUDA"),
        (
            "torch.utils._pytree",
            "<enum 'E'> is an Enum subclass and is now natively supported by torch.compile",
        ),
        ("lightning.pytorch.utilities.rank_zero", "💡 Tip: For seamless cloud logging, try LitLogger"),
    ],
)
def test_only_the_named_message_is_dropped(caplog: pytest.LogCaptureFixture, logger: str, noise: str) -> None:
    quiet.install()
    logging.getLogger(logger).propagate = True
    with caplog.at_level(logging.INFO, logger=logger):
        logging.getLogger(logger).warning(noise)
        logging.getLogger(logger).warning("the model is on %s", "fire")
        logging.getLogger("elsewhere").warning(noise)
    assert caplog.messages == ["the model is on fire", noise]


def test_warnings() -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        quiet.install()
        warnings.warn("`torch.jit.trace` is deprecated. Use export.", DeprecationWarning, stacklevel=1)
        warnings.warn(
            "The 'val_dataloader' does not have many workers which may be a bottleneck.", stacklevel=1
        )
        warnings.warn("`isinstance(x, LeafSpec)` is deprecated", FutureWarning, stacklevel=1)
        warnings.warn("loss is nan", stacklevel=1)
    assert [str(w.message) for w in seen] == ["loss is nan"]


def test_installing_again_adds_nothing() -> None:
    quiet.install()
    before = (list(logging.getLogger("torchao").filters), len(warnings.filters))
    quiet.install()
    assert (logging.getLogger("torchao").filters, len(warnings.filters)) == before


def test_the_noise_of_the_imports_is_gone() -> None:
    code = "import qaware, torchao.quantization"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""
