"""The tokens that end a reply: one set for training, sampling, fit, evaluation, artefact and both engines."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import AutoConfig, GenerationConfig


def ends_of(*settings: Any) -> set[int]:
    """What configurations and tokenizers name as `eos_token_id`: a number, several, or none."""
    found: set[int] = set()
    for one in settings:
        ends = getattr(one, "eos_token_id", None)
        found.update([ends] if isinstance(ends, int) else map(int, _listed(ends)))
    return found


def model_ends(path: str | Path) -> set[int]:
    """The end tokens that transformers itself would use for a model: those of its generation_config and its config.

    One that the model has no row for is never drawn, so it is none. An adapter has neither configuration; whoever
    decodes it uses its base model's. Raises ValueError where a generation_config.json cannot be read.
    """
    found: set[int] = set()
    is_local = Path(path).is_dir()
    if not is_local or (Path(path) / "generation_config.json").is_file():
        try:
            found |= ends_of(GenerationConfig.from_pretrained(path))
        except OSError as error:
            if is_local:
                raise ValueError(
                    f"{path}/generation_config.json cannot be read ({error}). Correct or remove it."
                ) from error
            found = set()  # a hub model without one
    if not is_local or (Path(path) / "config.json").is_file():
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        text = config.get_text_config()
        found |= ends_of(config, text)
        found = {end for end in found if 0 <= end < text.vocab_size}
    return found


def _listed(ends: Any) -> Iterable[Any]:
    return () if ends is None else ends
