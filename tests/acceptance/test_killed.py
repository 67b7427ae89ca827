"""A run that is killed goes on in another process as if nothing had happened."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from .child import SCHEDULE, begin
from .runs import STATIC, different, outcome, qat, trainer

TESTS = Path(__file__).parents[1]


@pytest.mark.parametrize(("kind", "step"), [("plain", 8), ("text", 14)])
def test_case_03_resume_after_kill_is_exact(kind: str, step: int, tmp_path: Path) -> None:
    """Lightning #6457 #8485 #11346: SIGKILL in the middle of an epoch; a new process, another seed and fresh
    objects go on from the last checkpoint. A plain module with a resumable loader, and the library's own."""
    arguments = [sys.executable, "-m", "acceptance.child", kind, str(tmp_path), str(step)]
    killed = subprocess.run(arguments, cwd=TESTS, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    module, data = begin(kind, tmp_path)
    run = trainer(qat(STATIC, convert=False, **SCHEDULE))
    run.fit(module, **data)
    expected = outcome(run, module, tmp_path)

    module, data = begin(kind, tmp_path, seed=77)
    run = trainer(qat(STATIC, convert=False, **SCHEDULE))
    run.fit(module, **data, ckpt_path=tmp_path / "kept" / "last.ckpt")
    saved_at = step // 3 * 3
    assert len(expected.losses) > step
    assert module.losses == expected.losses[saved_at:]
    assert different(expected, outcome(run, module, tmp_path)) == []
