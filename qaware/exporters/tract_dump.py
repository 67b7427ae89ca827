"""What tract multiplies, from its own description of a loaded model.

tract may end the process that loads a graph, so it is asked in another one: this file is also a script,
which imports nothing but tract.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

_TIMEOUT = 600
_PRODUCTS = ("MatMul", "Conv", "DepthWise", "EinSum")
"""In the names of operators that multiply by weights; sums and scalings have costs as well."""


def products(path: Path) -> dict[str, int] | None:
    """Products of the optimized model by type: ``{"I32": 19, "F32": 1}`` are 19 of integers, summed in int32,
    and one of floats. None where tract does not load the file, which loading it as an artifact explains."""
    command = [sys.executable, __file__, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
    if done.returncode:
        return None
    counts: Counter[str] = Counter()
    for cost in json.loads(done.stdout):
        counts.update(kind[4:-1] for kind in cost if kind.startswith("FMA("))
    return dict(counts)


def _costs(path: str) -> list[dict[str, Any]]:
    import tract

    model = tract.nnef().with_tract_extra().with_tract_transformers().load(path).into_runnable()
    nodes = json.loads(model.profile_json(None))["nodes"]
    found = [node for node in nodes if any(kind in node["op_name"] for kind in _PRODUCTS)]
    return [node["cost"] for node in found if node.get("cost")]


if __name__ == "__main__":
    # Its folder, which Python puts first, has a module of the name tract too.
    sys.path.pop(0)
    print(json.dumps(_costs(sys.argv[1])))
