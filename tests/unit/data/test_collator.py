import re

import numpy as np
import pytest
import torch

from metatokens.config.schema import ExplicitInjection, NoInjection, PeriodicInjection, UniformInjection
from metatokens.data.collator import MetaTokenCollator

META, PAD = 100, 101


def collate(*rows, injection=None, seed=0):
    return collate_features(*({"input_ids": list(row)} for row in rows), injection=injection, seed=seed)


def collate_features(*features, injection=None, seed=0):
    collator = MetaTokenCollator(
        UniformInjection(ratio=0.25) if injection is None else injection,
        meta_token_id=META,
        pad_token_id=PAD,
        seed=seed,
    )
    return collator(features)


def test_rows_of_different_lengths_are_padded_on_the_right():
    batch = collate(range(3), range(9))
    assert batch["input_ids"].shape == (2, 12)
    assert batch["attention_mask"].sum(dim=1).tolist() == [4, 12]
    assert (batch["input_ids"][0, 4:] == PAD).all()
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    assert "meta_indices" not in batch


def test_labels_are_the_text_without_its_first_token():
    batch = collate(range(10, 19), range(30, 33), range(50, 59))
    for row, text in enumerate((range(10, 19), range(30, 33), range(50, 59))):
        input_ids, labels = batch["input_ids"][row], batch["labels"][row]
        assert labels[labels != -100].tolist() == list(text)[1:]
        assert (labels == -100).logical_or(labels == input_ids).all()


def test_meta_indices_are_given_when_every_row_has_as_many():
    batch = collate(range(9), range(20, 29), injection=PeriodicInjection(ratio=0.25))
    assert batch["meta_indices"].tolist() == [[3, 7, 11], [3, 7, 11]]
    assert (batch["input_ids"].gather(1, batch["meta_indices"]) == META).all()


def test_layout_of_a_row_depends_on_its_tokens_and_the_seed_only():
    alone, other = collate(range(60)), collate(range(60), seed=1)
    together = collate(range(5), range(60), range(1, 61))
    assert torch.equal(together["input_ids"][1], alone["input_ids"][0])
    assert not torch.equal(other["input_ids"], alone["input_ids"])
    assert not torch.equal(together["input_ids"][2] == META, together["input_ids"][1] == META)


def test_rows_without_injection_are_only_padded():
    batch = collate([1, 2, 3], [4], injection=NoInjection())
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, PAD, PAD]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [-100, -100, -100]]


@pytest.mark.parametrize(("rows", "message"), [([], "at least one row"), ([[1], []], "at least one token")])
def test_batch_with_nothing_in_a_row_is_a_value_error(rows, message):
    with pytest.raises(ValueError, match=message):
        collate(*rows)


AT_0_AND_2 = ExplicitInjection(positions=(0, 2))


def test_labels_of_the_users_own_move_with_their_tokens():
    row = {"input_ids": [10, 11, 12, 13], "labels": [-100, -100, 12, 7]}
    batch = collate_features(row, injection=AT_0_AND_2)
    assert batch["input_ids"].tolist() == [[META, 10, META, 11, 12, 13]]
    assert batch["labels"].tolist() == [[-100, -100, -100, -100, 12, 7]]


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_masks_of_labels_leave_a_loss_where_all_of_them_are_one(kind):
    masks = {"completion_mask": kind([0, 0, 1, 1]), "assistant_masks": kind([1, 1, 1, 0])}
    batch = collate_features({"input_ids": kind([10, 11, 12, 13]), **masks}, injection=AT_0_AND_2)
    assert batch["labels"].tolist() == [[-100, -100, -100, -100, 12, -100]]
    assert batch.keys() == {"input_ids", "attention_mask", "labels", "meta_indices"}


def test_padding_that_a_row_brings_keeps_its_place_and_gets_no_meta_token():
    padded = {"input_ids": [PAD, 10, PAD, 11, 12, PAD], "attention_mask": [0, 1, 0, 1, 1, 0]}
    batch = collate_features(padded, {"input_ids": [10, 11, 12]}, injection=AT_0_AND_2)
    assert batch["input_ids"].tolist() == [
        [PAD, META, 10, META, PAD, 11, 12, PAD],
        [META, 10, META, 11, 12, PAD, PAD, PAD],
    ]
    assert batch["attention_mask"].tolist() == [[0, 1, 1, 1, 0, 1, 1, 0], [1, 1, 1, 1, 1, 0, 0, 0]]
    assert batch["labels"].tolist() == [
        [-100, -100, -100, -100, -100, 11, 12, -100],
        [-100, -100, -100, 11, 12, -100, -100, -100],
    ]
    assert batch["meta_indices"].tolist() == [[1, 3], [0, 2]]


def test_padded_row_has_the_layout_of_its_text():
    padded = {"input_ids": [PAD] * 7 + list(range(60)), "attention_mask": [0] * 7 + [1] * 60}
    assert torch.equal(collate_features(padded)["input_ids"][0, 7:], collate(range(60))["input_ids"][0])


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ({"text": "ab"}, "column text cannot be moved with the tokens: remove it, the collator takes input_ids, "),
        ({"position_ids": [0, 1]}, "column position_ids cannot be moved"),
        ({"labels": None}, "column labels must hold an integer for each token, not 'None'"),
        ({"labels": [1.5, 2.5]}, "column labels must hold an integer"),
        ({"labels": [1]}, "column labels has 1 values for the 2 tokens"),
        ({"attention_mask": [0, 0]}, "at least one token in input_ids that its attention_mask shows"),
    ],
)
def test_column_that_cannot_be_carried_is_a_value_error_that_names_it(column, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        collate_features({"input_ids": [1, 2], **column})


def test_row_without_ids_is_a_value_error_that_names_what_it_has():
    with pytest.raises(ValueError, match="needs input_ids; found text"):
        collate_features({"text": "ab"})


def test_batch_too_short_for_a_meta_token_warns():
    with pytest.warns(UserWarning, match="uniform puts no meta-token into a batch"):
        collate([1, 2, 3], injection=UniformInjection(ratio=0.1))


def test_padding_with_the_meta_token_is_a_value_error():
    with pytest.raises(ValueError, match="must differ"):
        MetaTokenCollator(NoInjection(), meta_token_id=1, pad_token_id=1)
