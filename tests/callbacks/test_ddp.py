"""Two processes on gloo: the same scores on every rank, files written once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, os, sys
import lightning.pytorch as pl, torch
torch.set_num_threads(1)
from qaware import QuantizationAwareTraining
from qaware.lm import CausalLM, TextDataModule
if __name__ == "__main__":
    processes, folder = int(sys.argv[1]), sys.argv[2]
    pl.seed_everything(0)
    size = dict(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=1)
    heads = dict(num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32)
    model = CausalLM({"model_type": "llama", **size, **heads})
    data = TextDataModule(folder + "/text.txt", tokenizer=300, block_size=32, max_val_windows=21,
                          batch_size=8 // processes, cache_dir=folder + "/cache")
    qat = QuantizationAwareTraining("int8-dynamic-int4-weight", output_dir=f"{folder}/out{processes}")
    pl.Trainer(max_steps=4, accelerator="cpu", devices=processes, strategy="ddp" if processes > 1 else "auto",
               callbacks=[qat], logger=False, enable_checkpointing=False, enable_progress_bar=False,
               enable_model_summary=False).fit(model, datamodule=data)
    rank = int(os.environ.get("LOCAL_RANK", 0))
    with open(f"{folder}/rank{rank}of{processes}.json", "w") as file:
        json.dump({s: qat.result.scores[s].nats for s in ("prepared", "converted")}, file)
"""


def run(folder: Path, processes: int) -> list[dict[str, float]]:
    (folder / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(folder / "script.py"), str(processes), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads((folder / f"rank{r}of{processes}.json").read_text()) for r in range(processes)]


def test_two_processes_score_like_one(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("".join(f"{i} and {i * i % 97} make {i % 13}.\n" for i in range(900)))
    (alone,) = run(tmp_path, 1)
    first, second = run(tmp_path, 2)
    assert first == second
    assert first["converted"] == first["prepared"]
    assert first["converted"] == pytest.approx(alone["converted"], abs=1e-4)
    rows = (tmp_path / "out2" / "results.jsonl").read_text().splitlines()
    assert [json.loads(row)["stage"] for row in rows] == ["float", "prepared", "converted"]
