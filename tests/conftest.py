"""One thread and no network: a test must depend neither on the machine's load nor on a hub."""

from __future__ import annotations

import os
from pathlib import Path

# Before torch and the Hugging Face libraries are imported, which read them once; children inherit them.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real models and texts, which is no part of the project."""
    folder = Path(__file__).parents[1].parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"real data is not here ({folder})")
    return folder
