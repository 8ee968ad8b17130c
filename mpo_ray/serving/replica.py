"""A replica: the policies of one artefact and the engine that decodes with them."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from ray import serve as ray_serve

from mpo_ray.config import ConfigError
from mpo_ray.config_serving import Serve
from mpo_ray.decoding.engine_thread import EngineThread
from mpo_ray.decoding.open_engine import open_engine
from mpo_ray.decoding.protocol import Engine, GenerationRequest, Statistics
from mpo_ray.serving.interface import interface_of
from mpo_ray.serving.ray_metrics import RayInstruments
from mpo_ray.serving.side_by_side import side_by_side
from mpo_ray.serving.wire import OtherArtefactError, pack_batch, pack_error

logger = logging.getLogger(__name__)


class Replica:
    """Decodes for the ingress. `user_config: {"weights": {…}}` swaps the default weights, for requests to come.

    digest: of the artefact: another one makes another deployment, whose replicas take the place of these
    """

    def __init__(self, artefact: str, digest: str, serve: Serve) -> None:
        self._interface = interface_of(artefact, serve.context, serve.engine).digest
        self._engine = _opened(artefact, digest, serve)
        self._name = ray_serve.get_replica_context().replica_id.unique_id
        self._shown = RayInstruments(engine=True)
        self._messages_per_step = serve.messages_per_step
        self._num_streams = 0

    def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        unknown = sorted(set(user_config) - {"weights"})
        if unknown:
            raise ConfigError(f"user_config: unknown key {unknown[0]!r}; the known key is 'weights'.")
        if "weights" in user_config:
            self._engine.set_weights(user_config["weights"])

    async def generate(self, interface: str, requests: Sequence[GenerationRequest]) -> AsyncGenerator[bytes]:
        """Messages of `wire`: what is added to any of the completions, or an error that ends them."""
        if interface != self._interface:
            yield pack_error(OtherArtefactError("another artefact is served here."))
            return
        self._num_streams += 1
        try:
            async with aclosing(
                side_by_side(self._engine, requests, tokens_per_delta=self._tokens_per_message)
            ) as batches:
                async for batch in batches:
                    yield pack_batch(batch, self._name, self._engine.statistics())
        except Exception as error:
            logger.info("a request ends with %r", error)
            yield pack_error(error)
        finally:
            self._num_streams -= 1

    def statistics(self) -> tuple[str, Statistics]:
        """The replica's name, and where its engine stands."""
        return self._name, self._engine.statistics()

    def describe(self) -> str:
        """What its KV cache holds."""
        return str(self._engine)

    def check_health(self) -> None:
        """Raise EngineError if the engine has ended or is stuck: Serve then replaces this replica."""
        self._shown.hear(self._name, self._engine.statistics())
        self._engine.check_health()

    def _tokens_per_message(self) -> float:
        """Of each completion: then streams of one completion together send no more messages in a step than allowed."""
        return self._num_streams / self._messages_per_step


def _opened(artefact: str, digest: str, serve: Serve) -> Engine:
    if serve.engine == "vllm":
        from mpo_ray.vllm_plugin.engine import VllmEngine  # another package's, which may not be there

        return VllmEngine(
            artefact,
            max_num_seqs=serve.max_num_seqs,
            context=serve.context,
            max_waiting=serve.max_waiting,
            stuck_after=serve.stuck_after_s,
            cache_salt=digest,
            arguments=serve.vllm,
        )
    engine = open_engine(
        artefact,
        max_num_seqs=serve.max_num_seqs,
        context=serve.context,
        kv_cache_gib=serve.kv_cache_gib,
        least_tokens=serve.least_tokens,
        precision=serve.precision,
        max_waiting=serve.max_waiting,
        prompt_tokens=serve.prompt_tokens_per_step,
    )
    return EngineThread(engine, stuck_after=serve.stuck_after_s)
