"""Copying: write the words at the start of the text once more, behind all of the filler."""

from metatokens.data.keyed_random import KeyedRandom
from metatokens.evaluation.long_context.cases import Case, task
from metatokens.evaluation.long_context.material import Material
from metatokens.tasks.words import ITEMS

WORDS = 8


@task("copying")
def copying(draw: KeyedRandom, material: Material) -> Case:
    """Copy eight words."""
    del material
    order = draw.shuffle(ITEMS)
    words = " ".join(next(order) for _ in range(WORDS))
    return Case(f"Line of words: {words}.", (), "The same line once more.\nLine of words:", f" {words}")
