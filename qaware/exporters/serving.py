"""The process that an artifact runs in: ``python -m qaware.exporters.serving RUNTIME PATH IN IN OUT OUT``.

It reads calls from stdin and answers on stdout, with large arrays in memory that it shares with its parent
(``isolated.py``), whose descriptors are IN and OUT.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qaware.errors import QawareError
from qaware.exporters.artifact import Artifact
from qaware.exporters.transport import Lane, receive, send

OK, ERROR, STEP = b"O", b"E", b"S"
"""What a message is: a call or its result, what went wrong, a step with a key-value cache."""


def _text(message: str) -> list[np.ndarray]:
    return [np.frombuffer(message.encode(), dtype=np.uint8)]


def serve(runtime: str, path: Path, requested: Lane, replied: Lane) -> None:
    """Load, say so, then answer calls until stdin closes: results, and the seconds that each took."""
    from qaware.exporters import get_exporter

    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the runtime prints must not mix with the replies
    try:
        signature = Artifact.open(path).signature
        run: Any = _opened(get_exporter(runtime), path, signature)
        sizes = [getattr(run, "length", 0), getattr(run, "most", signature.longest)]
        send(replies, replied.next(), OK, [np.array(sizes, dtype=np.int64)])
    except Exception as error:
        send(replies, replied.next(), ERROR, _text(f"cannot be loaded: {_told(error)}"))
        return
    while (request := receive(requests, requested.next())) is not None:
        try:
            tensors = [torch.from_numpy(a) for a in request[1]]
            began = time.perf_counter()
            with torch.no_grad():
                asked = request[0] == STEP
                output = run.step(tensors[0], int(tensors[1])) if asked else run(*tensors)
                found = output.float().contiguous().numpy()
            seconds = np.array(time.perf_counter() - began)
        except Exception as error:
            send(replies, replied.next(), ERROR, _text(_told(error)))
        else:
            send(replies, replied.next(), OK, [found, seconds])


def _opened(exporter: Any, path: Path, signature: Any) -> Any:
    from qaware.exporters.base import Exporter

    # Its packages; what exporting needs more, a compiler, is not asked for.
    if problem := Exporter.missing(exporter):
        raise QawareError(problem)
    return exporter.open(path, signature)


def _told(error: Exception) -> str:
    """One line; what qaware says itself needs no type."""
    from qaware.exporters.base import first_line

    return str(error) if isinstance(error, QawareError) else first_line(error)


if __name__ == "__main__":
    numbers = [int(text) for text in sys.argv[3:]]
    serve(sys.argv[1], Path(sys.argv[2]), Lane(*numbers[:2]), Lane(*numbers[2:]))
