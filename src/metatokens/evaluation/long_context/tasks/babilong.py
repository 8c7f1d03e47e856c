"""BABILong (Kuratov et al. 2024): the facts of a bAbI story, in their order, among the sentences of a book.

qa1 to qa5 need one, two and three supporting facts, and relations of two and three arguments.
"""

from metatokens.data.keyed_random import KeyedRandom
from metatokens.evaluation.long_context.cases import Case, draw_story, task
from metatokens.evaluation.long_context.material import Material

BEFORE = (
    "Facts about persons, places and things are hidden in the following text. "
    "Remember them and answer the question with one word."
)

# names and places that no story has
EXAMPLES = {
    1: ("Where is Charlie?", "balcony"),
    2: ("Where is the bottle?", "attic"),
    3: ("Where was the bottle before the attic?", "balcony"),
    4: ("What is north of the attic?", "balcony"),
    5: ("Who gave the bottle to Charlie?", "Anna"),
}


def _babilong(draw: KeyedRandom, material: Material, number: int) -> Case:
    story = draw_story(draw, material, number)
    question, answer = EXAMPLES[number]
    before = f"{BEFORE}\nFor example:\nQuestion: {question}\nAnswer: {answer}"
    return Case(before, story.facts, f"Question: {story.question}\nAnswer:", f" {story.answer}", needed=story.needed)


def _register(number: int) -> None:
    @task(f"babilong-qa{number}", hides_in="books", story=number)
    def babilong(draw: KeyedRandom, material: Material) -> Case:
        """Answer a question about a story."""
        return _babilong(draw, material, number)


for _number in EXAMPLES:
    _register(_number)
