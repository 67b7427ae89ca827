"""The two models that quality is measured on."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl

from benchmarks.case import Case
from qaware.lm import CausalLM, TextDataModule

SEED = 0
SEPARATOR = "<|endoftext|>"
SCORED_STORIES = 200
TEXT_STEPS = 500


def stories(shared: Path, folder: Path) -> Case | None:
    """llama2.c's stories260K with its own tokenizer: 200 stories are scored, the others are for calibration
    and fine-tuning. None where its files are not in ``shared``."""
    model, text = shared / "lm" / "stories260K" / "hf", shared / "text" / "tinystories_dev.txt"
    if not (model.is_dir() and text.is_file()):
        return None
    parts = text.read_text(encoding="utf-8").split(SEPARATOR)
    told = [story for story in parts if story.strip()]
    files = {"val": told[:SCORED_STORIES], "train": told[SCORED_STORIES:]}
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in files.items():
        (folder / f"{name}.txt").write_text(SEPARATOR.join(part), encoding="utf-8")
    data = TextDataModule(
        str(folder / "train.txt"),
        tokenizer=str(model),
        val_source=str(folder / "val.txt"),
        separator=SEPARATOR,
        layout="documents",
        block_size=512,
        batch_size=4,
        cache_dir=str(folder / "cache"),
    )
    return Case("stories260K", CausalLM(str(model)), data, folder, SEED)


def text_model(folder: Path) -> Case:
    """A Llama with 5.5 million parameters, trained here on Python's own documentation."""
    data = TextDataModule(
        "python-docs", tokenizer=2048, block_size=128, batch_size=16, cache_dir=str(folder / "cache")
    )
    pl.seed_everything(SEED, workers=True, verbose=False)
    model = CausalLM(
        {
            "model_type": "llama",
            "vocab_size": 2048,
            "hidden_size": 256,
            "intermediate_size": 704,
            "num_hidden_layers": 6,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "max_position_embeddings": 128,
            "tie_word_embeddings": False,
        },
        lr=3e-3,
        warmup_steps=40,
        weight_decay=0.1,
        cosine=True,
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=TEXT_STEPS,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(model, datamodule=data)
    return Case("python-docs 5.5M", model, data, folder, SEED)
