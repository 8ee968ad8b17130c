"""What an ingress has to know of an artefact, so that a replica can answer for it: its interface.

The ingress turns text into token ids and checks weights; a replica decodes. While one artefact replaces another, a call
may come from the ingress of either to a replica of either. Where the interfaces are the same, that is right: all
completions of an HTTP request are made in one call, by one replica, from one artefact. Where they differ, the replica
refuses, and the ingress looks for another.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from mpo_ray.decoding.protocol import ExactMethod
from mpo_ray.policies.artefact import has_reference
from mpo_ray.policies.loading import load_tokenizer
from mpo_ray.policies.mixture_config import MixtureConfig
from mpo_ray.policies.vocabulary import vocabulary_digest


@dataclass(frozen=True, slots=True)
class Interface:
    """objectives: in the mixture's order; context: tokens of a sequence, None for no limit

    has_reference: whether the policies' base is decoded as well, as one more
    exact_methods: of exact mode, the default first
    """

    objectives: tuple[str, ...]
    context: int | None
    vocabulary: str
    chat_template: str | None
    has_reference: bool
    exact_methods: tuple[ExactMethod, ...]

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def interface_of(artefact: str, context: int | None = None, engine: str = "mpo") -> Interface:
    """The interface of an artefact that an engine serves with `context` tokens of a sequence at most."""
    ours = engine == "mpo"
    config, tokenizer = MixtureConfig.from_pretrained(artefact), load_tokenizer(artefact)
    limits = [limit for limit in (context, config.max_position_embeddings) if limit is not None]
    return Interface(
        tuple(config.objectives),
        min(limits, default=None),
        vocabulary_digest(tokenizer),
        getattr(tokenizer, "chat_template", None),
        ours and has_reference(Path(artefact), config),
        ("smc", "rejection") if ours else ("rejection",),
    )


def artefact_digest(artefact: str) -> str:
    """Names an artefact's content, by what its config.json says of every file: another one is another deployment."""
    root, found = Path(artefact), hashlib.sha256()
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "chat_template.jinja"):
        found.update((root / name).read_bytes() if (root / name).is_file() else b"-")
    return found.hexdigest()
