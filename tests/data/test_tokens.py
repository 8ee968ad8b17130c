"""Batches of token ids."""

import torch

from mpo_ray.data.tokens import collate


def test_the_completion_mask_marks_completions_alone() -> None:
    batch = collate([([1, 7], [8, 9, 2]), ([1], [5])], pad_id=0)
    assert batch.input_ids.tolist() == [[1, 7, 8, 9, 2], [1, 5, 0, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert batch.completion_mask.tolist() == [[False, False, True, True, True], [False, True, False, False, False]]
    assert batch.completion_mask.dtype == torch.bool
