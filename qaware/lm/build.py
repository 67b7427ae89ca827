"""A causal LM of `transformers`, built from settings or loaded from a local folder or the hub."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from qaware.errors import QawareError
from qaware.lm.loading import hub_answers, one_line, quiet_transformers

_LEGACY_ROPE = {"rope_theta", "rope_scaling", "partial_rotary_factor"}


def from_config(config: dict[str, Any]) -> Any:
    """A model with random weights. QawareError for settings that it does not have or cannot be built from."""
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KINDS

    kind = config.get("model_type")
    if kind not in KINDS:
        raise QawareError(f"model.model_type: {kind!r} is no causal LM of transformers{_hint(kind, KINDS)}")
    known = _known_keys(CONFIG_MAPPING[kind])
    for key in config:
        if key not in known:
            raise QawareError(f"model.{key}: {kind!r} has no such setting{_hint(key, sorted(known))}")
    try:
        with _quiet_ids():
            return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
    except Exception as error:  # wrong types, sizes that do not divide
        cause = " ".join(str(error).split())[:300]
        raise QawareError(
            f"model: {kind!r} cannot be built from these settings ({cause}); change them"
        ) from error


def from_weights(name: str) -> Any:
    """The model of a local folder, else of the hub. QawareError when it cannot be loaded or is incomplete."""
    from transformers import AutoModelForCausalLM

    folder = Path(name).expanduser()
    local = folder.is_dir()
    try:
        only_cached = local or not hub_answers()
        with quiet_transformers() if local else nullcontext():
            model, info = AutoModelForCausalLM.from_pretrained(
                str(folder) if local else name,
                local_files_only=only_cached,
                # Where peft is installed, transformers looks for an adapter of that name too.
                adapter_kwargs={"local_files_only": only_cached},
                output_loading_info=True,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
            )
    except Exception as error:  # network, missing files and foreign formats each raise their own
        where = "this folder" if local else "the hub, and there is no such folder"
        raise QawareError(
            f"model: {name!r} could not be loaded from {where} ({one_line(error)}); give a folder with "
            "config.json and model.safetensors, a name that the hub has, or a configuration"
        ) from error
    if missing := sorted(info["missing_keys"]):
        raise QawareError(f"model: {name!r} has no weights for {', '.join(missing[:3])}; give a complete one")
    return model


def settings(config: Any) -> dict[str, Any]:
    """What of a model's configuration `from_config` takes, to build the same architecture again."""
    known = _known_keys(type(config))
    return {key: value for key, value in config.to_dict().items() if key in known}


def _known_keys(config: Any) -> set[str]:
    """The settings that a configuration class declares, under the names and aliases it accepts."""
    fields = set(config.__dataclass_fields__)
    rope = _LEGACY_ROPE if "rope_parameters" in fields else set()
    return fields | set(config.attribute_map) | rope | {"model_type", "attn_implementation"}


def _hint(value: object, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(value), list(names), n=3)
    return f"; did you mean {' or '.join(close)}?" if close else "; look up the names in its documentation"


@contextmanager
def _quiet_ids() -> Iterator[None]:
    """Hide that a default BOS or EOS id, which only `generate` uses, is beyond a small vocabulary."""
    logger = logging.getLogger("transformers.configuration_utils")

    def keep(record: logging.LogRecord) -> bool:
        return "an integer within the vocabulary" not in record.getMessage()

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)
