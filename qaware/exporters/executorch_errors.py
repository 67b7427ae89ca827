"""ExecuTorch's runtime in words: Python sees a hexadecimal code, the reason goes to stderr."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Iterator

from qaware.errors import QawareError
from qaware.exporters.base import first_line

_WORDS = {
    0x01: "an internal error of the runtime",
    0x02: "the runtime is in a state that forbids it; weights in a second file were not given",
    0x10: "an input has a size that the file was not exported for",
    0x11: "the runtime does not implement it",
    0x12: "an argument is not legal: the number, dtype or rank of the inputs",
    0x13: "a value is not of the type that the file says",
    0x14: "an operator has no kernel in this runtime",
    0x20: "what the file refers to was not found",
    0x21: "not enough memory",
    0x22: "the file cannot be opened",
    0x23: "not an ExecuTorch program, or a damaged or truncated one",
    0x24: "weights in a second file are damaged",
    0x25: "not enough resources",
    0x30: "a part was compiled for another version of XNNPACK, or is damaged",
    0x31: "not enough memory for XNNPACK",
    0x32: "XNNPACK lost a part of it",
}
"""By the codes of ``executorch/runtime/core/error.h``; those for authors of operators are left out."""
_CPU_FILES = "cpuinfo_utils.cpp"
"""Says at the first load which files of ARM boards it does not find, on every machine."""


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn errors of the runtime into one line, and quote the reason that it writes to ``sys.stderr``.

    Without an error, what it writes is passed on, less the messages about CPU files.

    Args:
        what: beginning of the line, e.g. ``model.pte: cannot be loaded``.

    Raises:
        QawareError: in place of any error inside.
    """
    log = io.StringIO()
    try:
        with contextlib.redirect_stderr(log):
            yield
    except Exception as error:
        code = re.search(r"error:? 0x:?([0-9a-fA-F]+)", str(error))
        words = _WORDS.get(int(code[1], 16)) if code else None
        text = f"{words} (error 0x{code[1]})" if code and words else first_line(error)
        said = f"; it said: {' | '.join(lines[-3:])[-400:]}" if (lines := _lines(log)) else ""
        raise QawareError(f"{what}: {text}{said}") from error
    for line in _lines(log):
        print(line, file=sys.stderr)


def _lines(log: io.StringIO) -> list[str]:
    return [line for line in log.getvalue().splitlines() if line.strip() and _CPU_FILES not in line]
