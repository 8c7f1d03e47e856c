"""The cases that the tests take out of a product hold every pair of values."""

from itertools import combinations, product

from hypothesis import given, settings
from hypothesis import strategies as st

from pairwise import cover_pairs


@settings(max_examples=20, deadline=None, derandomize=True)
@given(sizes=st.lists(st.integers(1, 4), min_size=2, max_size=4))
def test_every_two_values_of_two_factors_meet_in_a_case_of_the_product(sizes: list[int]) -> None:
    factors = {f"factor {number}": tuple(range(size)) for number, size in enumerate(sizes)}
    cases = cover_pairs(factors)
    assert set(cases) <= set(product(*factors.values()))
    assert len(set(cases)) == len(cases)
    for first, second in combinations(range(len(sizes)), 2):
        assert {(case[first], case[second]) for case in cases} == set(
            product(range(sizes[first]), range(sizes[second]))
        )


def test_a_product_of_many_factors_takes_about_as_many_cases_as_its_two_longest() -> None:
    factors = {"a": "abcdef", "b": "abcde", "c": "abcde", "d": "abc", "e": "ab", "f": "ab"}
    assert 30 <= len(cover_pairs({name: tuple(values) for name, values in factors.items()})) <= 40
