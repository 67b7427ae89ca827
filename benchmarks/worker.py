"""A process for one contender, told over its standard input what to do: build it, or open and call it.

Requests and replies are lines of JSON. A process of its own keeps runtimes apart (their thread pools, their
crashes), and shows the memory and the first load of one file.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.contender import Contender, Session, runtime


class Worker:
    """What a process holds between requests."""

    def __init__(self) -> None:
        self.session: Session = {}

    def build(self, name: str, model: str, variant: str, size: str, folder: str) -> dict[str, Any]:
        """Write a contender's file."""
        return runtime(name).build(model, variant, size, Path(folder)).to_dict()

    def open(self, contender: dict[str, Any], size: str, threads: int) -> dict[str, Any]:
        """Load it and call each of its functions once: seconds to the first answer, MB above the imports."""
        chosen = Contender(**contender)
        made = runtime(chosen.runtime)
        made.imports()
        before = peak_bytes()
        started = time.perf_counter()
        self.session = made.open(chosen, size, threads)
        next(iter(self.session.values()))()
        load = time.perf_counter() - started
        for call in self.session.values():
            call()
        peak = (peak_bytes() - before) / 1e6
        return {"load_s": load, "peak_mb": peak, "calls": sorted(self.session)}

    def time(self, what: str, count: int) -> dict[str, Any]:
        """Wall and CPU seconds of a call, over ``count`` of them; one more before warms the caches."""
        call = self.session[what]
        call()
        wall, used = time.perf_counter(), time.process_time()
        for _ in range(count):
            call()
        return {
            "wall": (time.perf_counter() - wall) / count,
            "cpu": (time.process_time() - used) / count,
        }

    def save(self, what: str, path: str) -> dict[str, Any]:
        """Write the logits of one call as .npy."""
        import numpy as np

        np.save(path, self.session[what]())
        return {}


def peak_bytes() -> int:
    """The most memory that this process has held (where /proc does not tell, as the system counts it)."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024
    # Not ru_maxrss, which on Linux starts at what the parent held.
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def main() -> None:
    """Answer requests until the input ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what runtimes print must not end up among the replies
    worker = Worker()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = getattr(worker, request.pop("do"))(**request)
        except Exception as error:  # whatever a runtime raises is an answer too
            reply = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        print(json.dumps(reply), file=replies, flush=True)
    # Some runtimes crash as Python takes them down, after all work is done.
    os._exit(0)


if __name__ == "__main__":
    main()
