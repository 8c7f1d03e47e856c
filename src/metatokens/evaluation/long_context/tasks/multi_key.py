"""Several needles of different names, one of which is asked for (RULER's niah_multikey)."""

from metatokens.data.keyed_random import KeyedRandom
from metatokens.evaluation.long_context.cases import Case, draw_keys, draw_numbers, task
from metatokens.evaluation.long_context.material import Material
from metatokens.evaluation.long_context.tasks.needle import BEFORE, DIGITS, needle, question

NEEDLES = 4  # RULER's niah_multikey_1


@task("multi-key")
def multi_key_needle(draw: KeyedRandom, material: Material) -> Case:
    """Find the number of one of four names."""
    del material
    keys, numbers = draw_keys(draw, NEEDLES), draw_numbers(draw, NEEDLES, DIGITS)
    asked = draw.below(NEEDLES)
    hidden = tuple(needle(key, number) for key, number in zip(keys, numbers, strict=True))
    return Case(BEFORE, hidden, question(keys[asked]), f" {numbers[asked]}", needed=asked)
