"""One needle: a number under a name (RULER's niah_single)."""

from metatokens.data.keyed_random import KeyedRandom
from metatokens.evaluation.long_context.cases import Case, draw_keys, draw_numbers, task
from metatokens.evaluation.long_context.material import Material

BEFORE = "Some special magic numbers are hidden within the following text. Make sure to memorize them."
DIGITS = 7  # RULER


def needle(key: str, number: str) -> str:
    """Return the sentence that is hidden."""
    return f"One of the special magic numbers for {key} is: {number}."


def question(key: str) -> str:
    """Return the question, as far as the number."""
    return (
        f"What is the special magic number for {key} mentioned in the text?\n"
        f"The special magic number for {key} mentioned in the text is"
    )


@task("needle")
def single_needle(draw: KeyedRandom, material: Material) -> Case:
    """Find the number of the only name."""
    del material
    (key,), (number,) = draw_keys(draw, 1), draw_numbers(draw, 1, DIGITS)
    return Case(BEFORE, (needle(key, number),), question(key), f" {number}")
