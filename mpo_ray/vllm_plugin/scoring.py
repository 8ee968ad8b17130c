"""vLLM in an actor of the scoring stage: log π_k of completions that are there already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mpo_ray.decoding.sampler import Room
from mpo_ray.policies.ensemble import Ensemble, Sequences
from mpo_ray.records import REFERENCE
from mpo_ray.vllm_plugin.offline import open_llm


class VllmEnsemble:
    """`Ensemble.logprobs` by vLLM. The reference, of which samples know log π_ref, is opened when it is asked for."""

    def __init__(
        self,
        reference: str,
        policies: Mapping[str, str],
        *,
        room: Room,
        precision: str = "fp32",
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        """room, arguments: as of `open_llm`

        Raises ModelError for policies that vLLM cannot hold, ConfigError for arguments that it does not have.
        """
        self._names = list(policies)
        self._reference, self._precision = reference, precision
        self._reference_alone: Ensemble | None = None
        own = {"runner": "pooling", "hf_overrides": {"architectures": ["MixtureScorer"]}}
        self._llm, _ = open_llm(reference, policies, precision=precision, room=room, own=own, further=arguments or {})

    def logprobs(
        self, names: Sequence[str], sequences: Sequences, *, batch_size: int, pad_id: int
    ) -> dict[str, list[float]]:
        """As `Ensemble.logprobs`; batch_size and pad_id are the reference's alone: vLLM has no use for them."""
        values: dict[str, list[float]] = {}
        if REFERENCE in names:
            self._reference_alone = self._reference_alone or Ensemble(self._reference, {}, precision=self._precision)
            values = self._reference_alone.logprobs([REFERENCE], sequences, batch_size=batch_size, pad_id=pad_id)
        wanted = [name for name in names if name != REFERENCE]
        if wanted:
            rows = self._sums(sequences)
            values |= {name: [row[self._names.index(name)] for row in rows] for name in wanted}
        return {name: values[name] for name in names}

    def _sums(self, sequences: Sequences) -> list[list[float]]:
        from vllm import PoolingParams

        from mpo_ray.vllm_plugin.scoring_model import TASK

        answers = self._llm.encode(
            [{"prompt_token_ids": [*prompt, *completion]} for prompt, completion in sequences],
            [PoolingParams(extra_kwargs={"first": len(prompt)}) for prompt, _ in sequences],
            pooling_task=TASK,
            use_tqdm=False,
        )
        return [answer.outputs.data.tolist() for answer in answers]
