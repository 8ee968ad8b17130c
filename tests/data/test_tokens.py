"""Token ids and batches: what is scored is what sampling produces."""

import pytest
import torch

from mpo_ray.data.tokens import collate, prompt_token_ids, render_prompt, response_token_ids
from tests.tiny import tiny_tokenizer

CHAT = ({"role": "user", "content": "the film"},)


def test_a_string_prompt_gets_the_tokenizers_start_token_and_no_template() -> None:
    tokenizer = tiny_tokenizer()
    assert tokenizer.convert_ids_to_tokens(prompt_token_ids(tokenizer, "the film")) == ["<s>", "the", "film"]


def test_chat_messages_are_rendered_with_the_template_and_one_start_token() -> None:
    tokenizer = tiny_tokenizer()
    tokens = tokenizer.convert_ids_to_tokens(prompt_token_ids(tokenizer, CHAT))
    assert tokens == ["<s>", "user", "the", "film", "assistant"]


def test_chat_messages_without_a_template_are_refused() -> None:
    with pytest.raises(ValueError, match=r"the film.*no chat template"):
        render_prompt(tiny_tokenizer(chat_template=False), CHAT)


def test_an_empty_prompt_is_the_start_token() -> None:
    assert prompt_token_ids(tiny_tokenizer(), "") == [1]


def test_a_response_ends_with_the_end_token_and_has_no_start_token() -> None:
    tokenizer = tiny_tokenizer()
    assert tokenizer.convert_ids_to_tokens(response_token_ids(tokenizer, "good plot")) == ["good", "plot", "</s>"]


def test_the_completion_mask_marks_completions_alone() -> None:
    batch = collate([([1, 7], [8, 9, 2]), ([1], [5])], pad_id=0)
    assert batch.input_ids.tolist() == [[1, 7, 8, 9, 2], [1, 5, 0, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert batch.completion_mask.tolist() == [[False, False, True, True, True], [False, True, False, False, False]]
    assert batch.completion_mask.dtype == torch.bool
