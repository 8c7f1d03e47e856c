"""Sums by document, and the choice of another document."""

import numpy as np
import pytest

from metatokens.analysis.inputs.documents import DocumentSums, choose_other_documents, merge_documents
from metatokens.errors import UsageError


def test_values_are_summed_by_document_and_missing_ones_are_not_counted() -> None:
    measured = DocumentSums.of_values([7, 3, 7, 3], [[1.0, 2.0], [3.0, np.nan], [5.0, 6.0], [4.0, np.nan]])
    assert measured.documents.tolist() == [3, 7]
    np.testing.assert_array_equal(measured.sums, [[7, 0], [6, 8]])
    np.testing.assert_array_equal(measured.means, [[3.5, np.nan], [3, 4]])
    np.testing.assert_array_equal(measured.mean, [13 / 4, 4])


def test_batches_merged_equal_the_whole() -> None:
    generator = np.random.default_rng(0)
    documents, values = generator.integers(0, 5, 40), generator.normal(size=(40, 3))
    parts = [DocumentSums.of_values(documents[i : i + 8], values[i : i + 8]) for i in range(0, 40, 8)]
    whole, merged = DocumentSums.of_values(documents, values), merge_documents(parts)
    np.testing.assert_array_equal(merged.documents, whole.documents)
    np.testing.assert_allclose(merged.means, whole.means, rtol=1e-12)


def test_difference_is_that_of_the_sums() -> None:
    first, second = DocumentSums.of_values([0, 1], [3.0, 5.0]), DocumentSums.of_values([0, 1], [1.0, 7.0])
    np.testing.assert_array_equal((first - second).means, [2, -2])


def test_difference_of_unpaired_measurements_is_refused() -> None:
    with pytest.raises(UsageError, match="same documents"):
        DocumentSums.of_values([0, 1], [3.0, 5.0]) - DocumentSums.of_values([0, 1], [3.0, np.nan])


def test_ids_that_do_not_fit_the_rows_are_refused() -> None:
    with pytest.raises(UsageError, match="one id for every row"):
        DocumentSums.of_values([0, 1, 2], [3.0, 5.0])


@pytest.mark.parametrize("documents", [[0, 1], [0, 0, 1, 2, 2, 3], [5, 5, 5, 1, 2, 2], list(range(9))])
def test_every_row_gets_a_row_of_another_document_and_each_is_given_once(documents: list[int]) -> None:
    for seed in range(20):
        partners = choose_other_documents(documents, seed=seed)
        assert sorted(partners.tolist()) == list(range(len(documents)))
        assert all(documents[partner] != own for partner, own in zip(partners, documents, strict=True))


def test_choice_depends_on_the_seed_alone() -> None:
    choices = [tuple(choose_other_documents(range(8), seed=seed)) for seed in (1, 1, 2)]
    assert choices[0] == choices[1] != choices[2]


def test_a_document_with_most_rows_has_no_control() -> None:
    with pytest.raises(UsageError, match="more than half"):
        choose_other_documents([0, 0, 1], seed=0)
