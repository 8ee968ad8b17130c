"""Three objectives' policies, and mixture artefacts written from them, for tests."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from transformers import AutoTokenizer

from mpo_ray.policies.artefact import write_artefact
from tests.tiny import tiny_llama, tiny_lora, tiny_tokenizer

WEIGHTS = {"positive": 0.5, "concise": 0.3, "detailed": 0.2}
PROMPT = "the film was"


def make_material(root: Path) -> Path:
    """A reference, three LoRA policies and three full ones, all with one vocabulary."""
    tokenizer = tiny_tokenizer()
    tiny_llama(root / "reference", tokenizer, seed=0)
    for seed, name in enumerate(WEIGHTS, start=1):
        tiny_lora(root / "lora" / name, root / "reference", seed)
        tiny_llama(root / "full" / name, tokenizer, seed)
    return root


def paths(material: Path, kind: str) -> dict[str, Path]:
    """The three policies: all `lora`, all `full`, or `mixed`, where one is full and two are adapters."""
    kinds = (
        dict.fromkeys(WEIGHTS, kind) if kind != "mixed" else dict(zip(WEIGHTS, ("lora", "full", "lora"), strict=True))
    )
    return {name: material / kinds[name] / name for name in WEIGHTS}


def write(material: Path, directory: Path, kind: str, weights: Mapping[str, float] = WEIGHTS) -> Path:
    write_artefact(
        directory,
        objectives=paths(material, kind),
        reference=material / "reference",
        copy_reference=True,
        weights=weights,
        fit={"method": "fixed"},
    )
    return directory


def ids_of(artefact: Path, text: str = PROMPT) -> list[int]:
    return AutoTokenizer.from_pretrained(artefact)(text).input_ids
