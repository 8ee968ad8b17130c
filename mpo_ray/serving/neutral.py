"""Fields of OpenAI's, vLLM's and their clients' that are not implemented, with the values that ask for nothing.

Null asks for nothing in every field, known or not. Any other value that is not in `NOT_IMPLEMENTED` is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Values = tuple[object, ...]

#: Of both kinds of completion.
NOT_IMPLEMENTED: Mapping[str, Values] = {
    # OpenAI's
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logprobs": (False,),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": ("in_memory",),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": ("medium",),
    "web_search_options": (),
    # vLLM's
    "add_generation_prompt": (True,),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "cache_salt": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": ([],),
    "early_stopping": (False,),
    "include_reasoning": (True,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1.0,),
    "logits_processors": ([],),
    "mm_processor_kwargs": ({},),
    "priority": (0,),
    "prompt_logprobs": (),
    "return_prompt_text": (False,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "structured_outputs": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
}
#: Of one message: what an answer of OpenAI's holds beside its text.
NOT_IN_MESSAGES: Mapping[str, Values] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "refusal": (),
}


def without_nulls(value: Any) -> Any:
    """JSON without the members that are null, at any depth. Places of an array stay, for they are counted."""
    if isinstance(value, dict):
        return {key: without_nulls(one) for key, one in value.items() if one is not None}
    if isinstance(value, list):
        return [without_nulls(one) for one in value]
    return value


def asks_for_nothing(value: Any, neutral: Values) -> bool:
    """Whether a value is null or among these, as JSON compares: 1 is 1.0, and not true."""
    value = without_nulls(value)
    return value is None or any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in neutral)
