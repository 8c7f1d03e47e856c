"""The passkey (Mohtashami and Jaggi 2023, section 4.2)."""

from metatokens.data.keyed_random import KeyedRandom
from metatokens.evaluation.long_context.cases import Case, draw_numbers, task
from metatokens.evaluation.long_context.material import Material

DIGITS = 5


@task("passkey")
def passkey(draw: KeyedRandom, material: Material) -> Case:
    """Find the only number of the text."""
    del material
    (number,) = draw_numbers(draw, 1, DIGITS)
    return Case(
        "There is important information hidden inside a lot of irrelevant text. Find it and memorize it.",
        (f"The pass key is {number}. Remember it. {number} is the pass key.",),
        "What is the pass key? The pass key is",
        f" {number}",
    )
