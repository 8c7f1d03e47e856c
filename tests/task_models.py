"""A tiny model that reads the recall tasks of `task_drawing`, whose words are one token each."""

from typing import Any

from metatokens.lens import Lens
from task_drawing import word_encoder
from tiny_models import tiny_model


def task_lens(**changes: Any) -> Lens:
    size = word_encoder().vocab_size
    tokens = {"vocab_size": size + 2, "meta_token_id": size, "pad_token_id": size + 1, "eos_token_id": 0}
    return Lens(tiny_model(**tokens, max_position_embeddings=160, **changes))
