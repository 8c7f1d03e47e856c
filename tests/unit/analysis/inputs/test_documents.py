"""Sums by document, and the choice of another document."""

import numpy as np
import pytest

from metatokens.analysis.inputs.documents import choose_other_documents, sum_by_document


def test_values_are_summed_by_document_in_the_order_of_their_ids() -> None:
    np.testing.assert_array_equal(sum_by_document([7, 3, 7, 3], [1.0, 3.0, 5.0, 4.0]), [7, 6])


@pytest.mark.parametrize("num_documents", [2, 3, 9])
def test_every_document_gets_another_one_and_each_is_given_once(num_documents: int) -> None:
    for seed in range(20):
        partners = choose_other_documents(num_documents, seed=seed).tolist()
        assert sorted(partners) == list(range(num_documents))
        assert all(partner != own for own, partner in enumerate(partners))


def test_choice_depends_on_the_seed_alone() -> None:
    choices = [tuple(choose_other_documents(8, seed=seed)) for seed in (1, 1, 2)]
    assert choices[0] == choices[1] != choices[2]


def test_a_single_document_has_no_other() -> None:
    with pytest.raises(ValueError, match="at least 2, not 1"):
        choose_other_documents(1, seed=0)
