"""tract's programs for one archive: as it is stored, and with Q4_0 weights expanded to float32.

tract multiplies Q4_0 blocks as they are, which is faster than floats while there are one or two vectors to
multiply, because fewer bytes are read: 2.0 times for one token of a model of 26 M parameters. With more
vectors it unpacks the blocks again for every few of them: 0.69 times the speed of floats at 4 vectors, 0.25
at 128 (CPU time on an AMD EPYC, tract 0.23.9). So longer inputs go to a second program, of the same
integers and scales as float32, made when the first of them comes. Exactly ``(integer) * scale`` in both.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from qaware.errors import QawareError
from qaware.exporters.tract_archive import expand

FEW = 2
"""Vectors up to which Q4_0 blocks are faster than floats."""
CACHE_LENGTH = "qaware_cache_length"
LONG_INPUTS = "qaware_long_inputs"
FORMS = ("float", "packed")
"""Of Q4_0 weights when inputs are long."""
_LONGEST_CAUSE = 300


class Programs:
    """What runs an archive.

    Raises:
        QawareError: tract cannot read it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        model = self._load(path)
        self.inputs = [str(fact) for fact in model.input_facts()]
        self.properties = {
            key: _text(model.property(key)) for key in model.property_keys() if key.startswith("qaware_")
        }
        self._packed = model.into_runnable()
        self._floats: Any = None

    def run(self, tensors: Sequence[Any], vectors: int) -> list[Any]:
        """tract's outputs of arrays or of its own tensors.

        Args:
            tensors: as many as there are inputs; tract ends the process when it is given fewer.
            vectors: at least so many are multiplied by each weight.
        """
        program = self._packed if vectors <= FEW else self._for_many()
        outputs: list[Any] = self._explained("run", lambda: program.run(list(tensors)))
        return outputs

    def _for_many(self) -> Any:
        if self.properties.get(LONG_INPUTS) != "float":
            return self._packed
        if self._floats is None:
            with tempfile.TemporaryDirectory(prefix="qaware-") as folder:
                expand(self.path, Path(folder))
                self._floats = self._load(Path(folder)).into_runnable()
        return self._floats

    def _load(self, path: Path) -> Any:
        import tract

        nnef = tract.nnef().with_tract_extra().with_tract_transformers()
        return self._explained("load", lambda: nnef.load(str(path)))

    def _explained(self, what: str, call: Any) -> Any:
        import tract

        try:
            return call()
        except tract.TractError as error:
            raise QawareError(f"{self.path.name}: tract cannot {what} it: {root_cause(error)}") from None


def vectors(tensor: Tensor) -> int:
    """How many a linear layer multiplies that sees ``tensor``, at least: tokens, rows or places."""
    if not tensor.is_floating_point():
        return tensor.numel()
    return math.prod(tensor.shape[:-1])


def _text(value: Any) -> str:
    """Of a property. tract's own rendering is all there is: ``Tensor(,String 1024)``."""
    return str(value).partition("String ")[2].rstrip(")")


def root_cause(error: BaseException) -> str:
    """The last two causes that tract names, in one line, without the Rust stack trace after them."""
    text = str(error).partition("Stack backtrace")[0]
    causes = re.split(r"(?m)^\s*\d+: ", text.partition("Caused by:")[2] or text)
    words = [" ".join(cause.split()) for cause in causes if cause.strip()]
    # Of a file that is no archive, tract quotes the bytes.
    said = "".join(c if c.isprintable() else "?" for c in ": ".join(words[-2:]))
    return said[:_LONGEST_CAUSE] or type(error).__name__
