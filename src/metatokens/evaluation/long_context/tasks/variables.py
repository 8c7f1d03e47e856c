"""A chain of variables, each assigned the one before (RULER's variable tracking)."""

from itertools import pairwise

from metatokens.data.keyed_random import KeyedRandom
from metatokens.evaluation.long_context.cases import Case, draw_numbers, task
from metatokens.evaluation.long_context.material import Material

HOPS = 4  # RULER
LETTERS_OF_A_NAME = 5
_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@task("variables")
def variable_tracking(draw: KeyedRandom, material: Material) -> Case:
    """Name the five variables that hold a value."""
    del material
    names: list[str] = []
    while len(names) <= HOPS:
        name = "".join(draw.choose(_ALPHABET) for _ in range(LETTERS_OF_A_NAME))
        if name not in names:
            names.append(name)
    (number,) = draw_numbers(draw, 1, LETTERS_OF_A_NAME)
    chain = [
        f"VAR {names[0]} = {number}.",
        *(f"VAR {new} = VAR {old}." for old, new in pairwise(names)),
    ]
    return Case(
        "Memorize and track the chains of variable assignment hidden in the following text.",
        tuple(chain),
        f"Question: Find all variables that are assigned the value {number} in the text above.\n"
        f"Answer: According to the chain of variable assignment in the text above, {HOPS + 1} variables are assigned "
        f"the value {number}, they are:",
        f" {', '.join(names)}",
    )
