"""The decoder under transformers' heads, from a language model's weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from metatokens import (
    MetaTokenForQuestionAnswering,
    MetaTokenForSequenceClassification,
    MetaTokenForTokenClassification,
)
from metatokens.model.export import save_model
from tiny_models import META, PAD, assert_close, attention_mask_of, randomize, tiny_config, tiny_model, tokens

IDS = tokens("x_xx_xx", "xx_xx..", "..x_xx_")
LABELS = torch.tensor([2, 0, 1])
CLASSES = {
    MetaTokenForSequenceClassification: AutoModelForSequenceClassification,
    MetaTokenForTokenClassification: AutoModelForTokenClassification,
    MetaTokenForQuestionAnswering: AutoModelForQuestionAnswering,
}


def with_head(model_class: Any, **changes: Any) -> Any:
    labels = {} if model_class is MetaTokenForQuestionAnswering else {"num_labels": 3}
    return randomize(model_class(tiny_config(**labels, **changes))).eval()


@pytest.mark.parametrize("model_class", CLASSES)
@torch.no_grad()
def test_auto_class_puts_a_new_head_on_the_decoder_of_a_language_model(model_class: Any, tmp_path: Path) -> None:
    language_model = tiny_model()
    save_model(language_model, tmp_path)
    model, report = CLASSES[model_class].from_pretrained(tmp_path, output_loading_info=True)
    assert type(model) is model_class
    assert {name.split(".")[0] for name in report["missing_keys"]} <= {"score", "qa_outputs"}
    expected = language_model.model(IDS).last_hidden_state
    assert torch.equal(model.model(IDS).last_hidden_state, expected)


@pytest.mark.parametrize("model_class", CLASSES)
@torch.no_grad()
def test_loaded_head_gives_the_bits_of_the_saved_one(model_class: Any, tmp_path: Path) -> None:
    model = with_head(model_class)
    save_model(model, tmp_path)
    loaded = CLASSES[model_class].from_pretrained(tmp_path)
    for actual, expected in zip(loaded(IDS).to_tuple(), model(IDS).to_tuple(), strict=True):
        if isinstance(actual, Tensor):
            assert torch.equal(actual, expected)


@torch.no_grad()
def test_sequence_is_read_at_its_last_token_on_either_side_of_padding() -> None:
    model = with_head(MetaTokenForSequenceClassification)
    output = model(IDS, attention_mask=attention_mask_of(IDS), labels=LABELS)
    for row, logits in zip(IDS, output.logits, strict=True):
        alone = row[row != PAD][None]
        assert_close(logits, model.score(model.model(alone).last_hidden_state[0, -1]), 1e-5)
    assert_close(output.loss, cross_entropy(output.logits, LABELS), 1e-6)


def test_tokens_without_a_label_cost_nothing() -> None:
    model = with_head(MetaTokenForTokenClassification)
    labels = (IDS % 3).masked_fill((IDS == META) | (IDS == PAD), -100)
    output = model(IDS, attention_mask=attention_mask_of(IDS), labels=labels)
    assert_close(output.loss, cross_entropy(output.logits[labels >= 0], labels[labels >= 0]), 1e-6)


def test_answer_is_a_first_and_a_last_token() -> None:
    model = with_head(MetaTokenForQuestionAnswering)
    first, last = torch.tensor([1, 0, 3]), torch.tensor([2, 4, 5])
    output = model(IDS, attention_mask=attention_mask_of(IDS), start_positions=first, end_positions=last)
    expected = (cross_entropy(output.start_logits, first) + cross_entropy(output.end_logits, last)) / 2
    assert_close(output.loss, expected, 1e-6)


@pytest.mark.parametrize("model_class", CLASSES)
@torch.no_grad()
def test_head_reads_meta_attention(model_class: Any) -> None:
    model = with_head(model_class)
    without_any = torch.zeros_like(IDS, dtype=torch.bool)
    with_meta, without = (model(IDS, **inputs)[0] for inputs in ({}, {"meta_token_mask": without_any}))
    assert not torch.allclose(with_meta, without, atol=1e-3)
