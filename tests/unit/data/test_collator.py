import pytest
import torch

from metatokens.config.schema import NoInjection, PeriodicInjection, UniformInjection
from metatokens.data.collator import MetaTokenCollator

META, PAD = 100, 101


def collate(*rows, injection=None, seed=0):
    collator = MetaTokenCollator(
        UniformInjection(ratio=0.25) if injection is None else injection,
        meta_token_id=META,
        pad_token_id=PAD,
        seed=seed,
    )
    return collator([{"input_ids": list(row)} for row in rows])


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


@pytest.mark.parametrize("rows", [[], [[1], []]])
def test_batch_with_nothing_in_a_row_is_a_value_error(rows):
    with pytest.raises(ValueError, match="at least one token"):
        collate(*rows)


def test_padding_with_the_meta_token_is_a_value_error():
    with pytest.raises(ValueError, match="must differ"):
        MetaTokenCollator(NoInjection(), meta_token_id=1, pad_token_id=1)
