"""Lengths beyond a model's window: n/a unless asked for, and only where positions go on for ever."""

from typing import Any

import pytest
import torch

from metatokens.config.finetuning import EvaluateConfig
from metatokens.config.schema import DynamicScaling, ModelConfig, YarnScaling
from metatokens.config.tasks import ListPointerTask, ListRecallTask, Task
from metatokens.data.tokenizer import TextEncoder
from metatokens.evaluation.recall import RecallRow, evaluate_recall
from metatokens.tasks.base import PieceEncoder
from metatokens.training.finetuning import word_tokenizer
from metatokens.training.initialization import build_model

WINDOW = 64
YARN = {
    "max_position_embeddings": WINDOW,
    "rope_scaling": YarnScaling(factor=2, original_max_position_embeddings=WINDOW // 2),
}
DYNAMIC = {"max_position_embeddings": WINDOW // 2, "rope_scaling": DynamicScaling(factor=2)}


@pytest.fixture(scope="module")
def encoder() -> PieceEncoder:
    return PieceEncoder(TextEncoder(word_tokenizer()))


def make_model(encoder: PieceEncoder, **changes: Any) -> Any:
    shape = ModelConfig(
        **{
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_position_embeddings": WINDOW,
            **changes,
        }
    )
    return build_model(shape, text_vocab_size=encoder.vocab_size, eos_token_id=0, seed=0).eval()


def ask(model: Any, encoder: PieceEncoder, *, extrapolate: bool, task: Task | None = None) -> tuple[RecallRow, ...]:
    config = EvaluateConfig(
        task=task or ListRecallTask(),
        size=(2, 4),
        lengths=("1-48", "100-128"),
        instances=4,
        extrapolate=extrapolate,
    )
    return evaluate_recall([model], config, encoder)


@pytest.mark.parametrize("changes", [{}, YARN, {"position_encoding": "t5"}, {"position_encoding": "fourier"}])
def test_a_length_beyond_the_window_is_asked_only_where_it_is_wanted(encoder: PieceEncoder, changes: dict[str, Any]):
    model = make_model(encoder, **changes)
    near, far = ask(model, encoder, extrapolate=False)
    assert near.token_accuracy is not None
    assert far.token_accuracy is None
    assert ask(model, encoder, extrapolate=True)[0] == near
    assert ask(model, encoder, extrapolate=True)[1].token_accuracy is not None
    assert model.config.max_position_embeddings == WINDOW
    with pytest.raises(ValueError, match="longer than the model's 64"):
        model(torch.zeros(1, WINDOW + 1, dtype=torch.long))


@pytest.mark.parametrize("changes", [{"position_encoding": "learned"}, {"position_range": 2 * WINDOW}, DYNAMIC])
def test_a_table_or_range_of_positions_and_dynamic_scaling_end_at_the_window_whatever_is_wanted(
    encoder: PieceEncoder, changes: dict[str, Any]
):
    near, far = ask(make_model(encoder, **changes), encoder, extrapolate=True)
    assert near.token_accuracy is not None
    assert far.token_accuracy is None


def test_choices_are_scored_beyond_the_window_too(encoder: PieceEncoder):
    assert ask(make_model(encoder), encoder, extrapolate=True, task=ListPointerTask())[1].token_accuracy is not None


@pytest.mark.parametrize("task", [ListRecallTask(), ListPointerTask()], ids=["answers", "choices"])
def test_positions_from_a_range_are_spread_for_the_text_and_not_for_the_window(encoder: PieceEncoder, task: Task):
    changes = {"position_encoding": "learned", "position_range": 512}
    config = EvaluateConfig(task=task, size=(2, 4), lengths=("1-48",), instances=12)
    read: list[list[Any]] = []
    for window in (80, 500):
        model = make_model(encoder, max_position_embeddings=window, **changes)
        read.append([])
        model.model.embed_positions.register_forward_hook(lambda _, inputs, __: read[-1].append(inputs[0]))
        evaluate_recall([model], config, encoder)
        assert model.config.max_position_embeddings == window
    short, long = read
    assert max(int(places.max()) for places in long) > 400
    assert all(map(torch.equal, short, long))
    assert len(short) == len(long) > 0
