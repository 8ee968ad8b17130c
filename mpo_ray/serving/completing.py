"""From a checked HTTP request to its answer, plain or streamed."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from fastapi.requests import Request
from fastapi.responses import JSONResponse, Response

from mpo_ray.serving.answers import Bodies, ChatBodies, CompletionBodies, usage_of
from mpo_ray.serving.choices import Choice, Echo, Piece
from mpo_ray.serving.errors import ApiError, api_error_of
from mpo_ray.serving.gate import passage_of
from mpo_ray.serving.generation import Pieces, generation
from mpo_ray.serving.observer import Observer
from mpo_ray.serving.openai_schema import ChatRequest, CompletionRequest, Sampling
from mpo_ray.serving.plan import check_size, plan, wanted_weights
from mpo_ray.serving.prompt_tokens import PromptTokens
from mpo_ray.serving.served import Served
from mpo_ray.serving.side_by_side import Generate
from mpo_ray.serving.streaming import ClientGoneError, EventStream, chain, events_of, while_connected
from mpo_ray.serving.token_text import TokenText


class Completing:
    """What answers both kinds of completion."""

    def __init__(
        self, served: Served, tokenizer: Any, generate: Generate, prompts: PromptTokens, observer: Observer
    ) -> None:
        self._served, self._tokenizer, self._generate = served, tokenizer, generate
        self._prompts, self._observer = prompts, observer
        self._token_text = TokenText(tokenizer)

    async def completion(self, request: Request, body: CompletionRequest) -> Response:
        weights = wanted_weights(body, self._served)
        check_size(body, len(body.prompts), weights, self._served)
        for prompt in body.prompts:
            if isinstance(prompt, list):
                self._check_ids(prompt)
        ids = [one if isinstance(one, list) else await self._prompts.of_text(one) for one in body.prompts]
        echoes = [
            Echo(self._tokenizer.decode(row, skip_special_tokens=True) if isinstance(one, list) else one, tuple(row))
            for one, row in zip(body.prompts, ids, strict=True)
            if body.echo
        ]
        bodies = CompletionBodies(uuid.uuid4().hex, int(time.time()), body.model)
        return await self._answer(request, body, ids, echoes, weights, bodies)

    async def chat(self, request: Request, body: ChatRequest) -> Response:
        weights = wanted_weights(body, self._served)
        check_size(body, 1, weights, self._served)
        ids = await self._prompts.of_chat([one.for_template() for one in body.messages])
        bodies = ChatBodies(uuid.uuid4().hex, int(time.time()), body.model)
        return await self._answer(request, body, [ids], [], weights, bodies)

    def _check_ids(self, ids: Sequence[int]) -> None:
        unknown = next((token for token in ids if token >= len(self._tokenizer)), None)
        if unknown is not None:
            raise ApiError(400, f"the token id {unknown} is not in the vocabulary.", "prompt")

    async def _answer(
        self,
        request: Request,
        body: Sampling,
        prompts: Sequence[list[int]],
        echoes: Sequence[Echo],
        weights: dict[str, float] | None,
        bodies: Bodies,
    ) -> Response:
        for prompt in prompts:
            self._prompts.check_number(len(prompt), body.prompt_field)
        requests = plan(body, prompts, weights, self._served)
        choices = [
            Choice(
                self._tokenizer,
                self._token_text,
                prompt_ids=one.prompt_ids if one.continues_text else (),
                echo=echoes[number // body.n] if echoes else None,
                with_logprobs=body.num_logprobs is not None,
            )
            for number, one in enumerate(requests)
        ]
        prompt_tokens = sum(map(len, prompts))
        deadline = asyncio.get_running_loop().time() + self._served.timeout_s
        pieces = generation(self._generate, requests, choices, passage_of(request.scope), self._observer, deadline)
        streamed = False
        try:
            # a refusal comes before the first piece, while the status can still say so
            first = await while_connected(request.receive, self._until(deadline, anext(pieces)))
            if body.stream:
                events = events_of(
                    bodies,
                    first,
                    pieces,
                    num_choices=len(requests),
                    prompt_tokens=prompt_tokens,
                    include_usage=body.include_usage,
                    continuous_usage=body.continuous_usage,
                )
                streamed = True
                return EventStream(events, pieces, deadline)
            whole = self._until(deadline, _joined(first, pieces, len(requests)))
            joined = await while_connected(request.receive, whole)
        except ClientGoneError:
            return Response(status_code=499)
        except Exception as error:
            known = api_error_of(error)
            if known is None:
                raise
            known.param = {"prompt": body.prompt_field, "max_tokens": body.limit_field}.get(
                known.param or "", known.param
            )
            raise known from error
        finally:
            if not streamed:
                await pieces.aclose()
        tokens = sum(choice.num_tokens for choice in joined)
        return JSONResponse(bodies.whole(joined, usage_of(prompt_tokens, tokens)))

    @staticmethod
    async def _until(deadline: float, work: Any) -> Any:
        async with asyncio.timeout_at(deadline):
            return await work


async def _joined(first: Pieces, rest: AsyncGenerator[Pieces], num_choices: int) -> list[Piece]:
    """Every choice as one piece."""
    parts: list[list[Piece]] = [[] for _ in range(num_choices)]
    async for pieces in chain(first, rest):
        for number, piece in pieces:
            parts[number].append(piece)
    return [Piece.joined(one) for one in parts]
