"""Models written by hand, so that what causes their answer is known exactly; and minimal pairs for random ones.

A row is `BOS _ item x _ x _ ?` with three meta-tokens. The embedding holds the item's identity and the place says who
reads whom, so each attention is one edge a query: scores are so large that a softmax is one key, and a query without
its edge reads BOS or the first meta-token, which hold nothing.

    meta      layer 0: the second meta-token copies the item; layer 1: the question reads it from there
    direct    layer 1: the question reads the item itself (the second meta-token copies it as well, and nothing asks it)
    either    layer 1: the question reads whichever of the two it finds
    branch    layer 0: as meta, then meta-attention hands it to the third meta-token; layer 1: the question reads that
"""

from typing import Any, Literal

import numpy as np
import torch

from metatokens.analysis.inputs.pairs import MinimalPair, make_minimal_pairs
from metatokens.config.tasks import Difficulty, ListRecallTask
from metatokens.lens import Lens
from metatokens.model import MetaTokenConfig, MetaTokenForCausalLM
from task_drawing import word_encoder
from tiny_models import META as TINY_META
from tiny_models import tiny_model, tokens

Circuit = Literal["meta", "direct", "either", "branch"]

NUM_ITEMS = 4
BOS, FILLER, QUESTION, META = 4, 5, 6, 7
ITEM_AT, WRITER_AT, READER_AT, QUESTION_AT = 2, 4, 6, 7

# features of a state: what the item is, three places to copy it to, and what a position is for
IDENTITY, CACHED, RELAYED, OUTPUT = range(0, 4), range(4, 8), range(8, 12), range(12, 16)
NOTHING, ITEM, WRITER, READER, ASKS = range(16, 21)
NUM_FEATURES = 21
DEFAULT, MATCH = 0, 1  # dimensions of queries and keys
GAIN = 300.0  # a softmax weight of exp(-GAIN) is lost beside 1 in any dtype


def build_circuit(circuit: Circuit) -> MetaTokenForCausalLM:
    """Return the model of a circuit."""
    config = MetaTokenConfig(
        vocab_size=8,
        hidden_size=2 * NUM_FEATURES,
        intermediate_size=2,
        num_hidden_layers=2,
        num_attention_heads=1,
        head_dim=NUM_FEATURES,
        max_position_embeddings=8,
        position_encoding="learned",
        meta_token_id=META,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )
    model = MetaTokenForCausalLM(config).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
        for item in range(NUM_ITEMS):
            _set(model.model.embed_tokens.weight[item], IDENTITY[item])
            _set(model.lm_head.weight[item], OUTPUT[item])
        flags = {0: NOTHING, 1: NOTHING, ITEM_AT: ITEM, WRITER_AT: WRITER, READER_AT: READER, QUESTION_AT: ASKS}
        for position, flag in flags.items():
            _set(model.model.embed_positions.weight[position], flag)
        first, second = model.model.layers
        _wire(first.self_attn, WRITER, (ITEM,), copies=[(IDENTITY, CACHED)])
        source = {"meta": (WRITER,), "direct": (ITEM,), "either": (ITEM, WRITER), "branch": (READER,)}[circuit]
        held = {"meta": [CACHED], "direct": [IDENTITY], "either": [IDENTITY, CACHED], "branch": [RELAYED]}[circuit]
        _wire(second.self_attn, ASKS, source, copies=[(features, OUTPUT) for features in held])
        if circuit == "branch":
            _wire(first.meta_attn, READER, (WRITER,), copies=[(CACHED, RELAYED)])
    return model


def hand_made_pairs() -> list[MinimalPair]:
    """Return a pair for each item; every item is the answer once and the foil once."""
    return [_pair(item, (item + 1) % NUM_ITEMS) for item in range(NUM_ITEMS)]


def _pair(answer: int, foil: int) -> MinimalPair:
    clean, corrupt = (np.array([BOS, META, item, FILLER, META, FILLER, META, QUESTION]) for item in (answer, foil))
    return MinimalPair(clean, corrupt, answer, foil, np.array([ITEM_AT]), np.array([1, 4, 6]), QUESTION_AT)


def _set(vector: torch.Tensor, feature: int) -> None:
    """Write a feature as +1 and -1, so that a state's mean is 0 and a norm only scales it."""
    vector[feature], vector[NUM_FEATURES + feature] = 1.0, -1.0


def _wire(attention, asker: int, asked: tuple[int, ...], copies: list[tuple[range, range]]) -> None:
    """Let positions of one kind read those of another, and all others nothing; copy features of what is read."""
    attention.q_proj.bias[DEFAULT] = GAIN
    attention.q_proj.weight[MATCH, asker] = 4 * GAIN
    attention.k_proj.weight[DEFAULT, NOTHING] = 1.0
    for flag in asked:
        attention.k_proj.weight[MATCH, flag] = 1.0
    for sources, targets in copies:
        for source, target in zip(sources, targets, strict=True):
            attention.v_proj.weight[source, source] = 1.0
            _set(attention.o_proj.weight[:, source], target)


def random_lens(**changes: Any) -> Lens:
    """Return a lens on a model of random weights."""
    return Lens(tiny_model(**changes))


def random_pair(picture: str, item: int, question: int, seed: int = 0) -> MinimalPair:
    (ids,) = tokens(picture, seed=seed).numpy()
    corrupt = ids.copy()
    corrupt[item] = (ids[item] + 1) % 19
    return MinimalPair(ids, corrupt, 3, 5, np.array([item]), np.flatnonzero(ids == TINY_META), question)


RAGGED = [
    random_pair("xxx_xxx_xx_xxx", 1, 11, seed=1),
    random_pair("_xxxx_xx", 2, 6, seed=2),
    random_pair("xxxxx_xxxxx_xxxx__xx", 4, 18, seed=3),
]
"""Rows of unequal lengths, with different numbers of meta-tokens."""


def task_lens() -> Lens:
    """Return a lens on a model of random weights that reads `task_pairs`."""
    encoder = word_encoder()
    return random_lens(vocab_size=encoder.vocab_size + 2, meta_token_id=encoder.vocab_size, pad_token_id=None)


def task_pairs() -> list[MinimalPair]:
    encoder, difficulty = word_encoder(), Difficulty(size=(2, 4), prompt_tokens=(10, 60))
    special = {"encoder": encoder, "meta_token_id": encoder.vocab_size, "seed": 0}
    return make_minimal_pairs(ListRecallTask(), difficulty, pairs=6, **special)
