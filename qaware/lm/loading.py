"""Loading through Hugging Face's libraries: no long wait for an absent hub, no bars, errors in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

PATIENCE = 5.0
"""Seconds in which the hub must begin to answer."""


def one_line(error: BaseException) -> str:
    """The first non-empty line of an error's message, else its type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def hub_answers() -> bool:
    """Whether the hub can be reached; False in offline mode.

    Asked before the libraries load a name, because they try for half a minute or more to reach a hub that
    is away. Told to use only their caches, they fail at once, or find there what was loaded before.
    """
    import huggingface_hub

    try:
        huggingface_hub.get_session().head(huggingface_hub.HfApi().endpoint, timeout=PATIENCE)
    except Exception:  # the HTTP library below, and so the errors' types, differ between versions
        return False
    return True


@contextmanager
def only_cached_datasets(only: bool) -> Iterator[None]:
    """Have `datasets` look only into its cache, for which `load_dataset` has no argument."""
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or only
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Hide the bars that `datasets` draws over local files; downloads keep theirs."""
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hide the bar that `transformers` draws over a local folder's weights; downloads keep theirs."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
