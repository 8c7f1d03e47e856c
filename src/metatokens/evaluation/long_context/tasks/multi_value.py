"""Several needles of one name, all asked for in the order of the text (RULER's niah_multivalue)."""

from metatokens.data.keyed_random import KeyedRandom
from metatokens.evaluation.long_context.cases import Case, draw_keys, draw_numbers, task
from metatokens.evaluation.long_context.material import Material
from metatokens.evaluation.long_context.tasks.needle import BEFORE, DIGITS, needle

VALUES = 4  # RULER


@task("multi-value")
def multi_value_needle(draw: KeyedRandom, material: Material) -> Case:
    """Find all four numbers of a name."""
    del material
    (key,), numbers = draw_keys(draw, 1), draw_numbers(draw, VALUES, DIGITS)
    after = (
        f"What are all the special magic numbers for {key} mentioned in the text, in the order of the text?\n"
        f"The special magic numbers for {key} mentioned in the text are"
    )
    return Case(BEFORE, tuple(needle(key, number) for number in numbers), after, f" {', '.join(numbers)}")
