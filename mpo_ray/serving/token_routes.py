"""/tokenize and /detokenize, in vLLM's form: the tokens that the endpoint itself would use."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from mpo_ray.serving.answer_types import DetokenizeAnswer, TokenizeAnswer
from mpo_ray.serving.errors import ApiError
from mpo_ray.serving.model_ids import parse_model_id
from mpo_ray.serving.openai_schema import DetokenizeRequest, TokenizeRequest
from mpo_ray.serving.openapi_document import errors
from mpo_ray.serving.prompt_tokens import PromptTokens
from mpo_ray.serving.served import Served


def token_routes(served: Served, tokenizer: Any, prompts: PromptTokens) -> APIRouter:
    router = APIRouter()

    @router.post("/tokenize", responses=errors(400, 401, 404, 413, 415, 429))
    async def tokenize(body: TokenizeRequest) -> TokenizeAnswer:
        _check_model(body.model, served)
        if body.prompt is not None:
            ids = await prompts.of_text(body.prompt, add_special=body.add_special_tokens)
        else:
            ids = await prompts.of_chat([one.for_template() for one in body.messages or ()])
        names = [str(name) for name in tokenizer.convert_ids_to_tokens(ids)] if body.return_token_strs else None
        return {"count": len(ids), "max_model_len": served.context, "tokens": ids, "token_strs": names}

    @router.post("/detokenize", responses=errors(400, 401, 404, 413, 415, 429))
    async def detokenize(body: DetokenizeRequest) -> DetokenizeAnswer:
        _check_model(body.model, served)
        unknown = next((token for token in body.tokens if token >= len(tokenizer)), None)
        if unknown is not None:
            raise ApiError(400, f"the token id {unknown} is not in the vocabulary.", "tokens")
        if served.longest_prompt is not None:
            prompts.check_number(len(body.tokens), "tokens")
        return {"prompt": str(tokenizer.decode(body.tokens))}

    return router


def _check_model(model: str | None, served: Served) -> None:
    if model is not None:
        parse_model_id(model, served)
