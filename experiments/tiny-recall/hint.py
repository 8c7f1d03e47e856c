"""What does the paper's placement give away in list recall? Three solvers that read less than the question.

The meta-token stands right after the list that holds the answer; an arm without meta-tokens has no mark there. How
often, on test prompts of the sweep's settings, is each of these solvers right?

    by_place          takes the item by its number from the list that ends at the first meta-token, and reads no name
    in_marked_list    guesses among the items of that list, and reads no number either
    in_whole_prompt   guesses among all items of the prompt, all that is left without meta-tokens

The guesses are expected values, not draws.

    python experiments/tiny-recall/hint.py --out experiments/tiny-recall/hint.json
"""

import argparse
import json
import re
import sys
from pathlib import Path

from metatokens.config.tasks import Difficulty, ListRecallTask
from metatokens.data.tokenizer import TextEncoder
from metatokens.tasks.base import META, Instance, PieceEncoder
from metatokens.tasks.registry import make_instance
from metatokens.training.finetuning import word_tokenizer

# sweep.yaml
TASK = ListRecallTask(questions=4, num_lists=(1, 200))
SIZE, PROMPT_TOKENS, SEED = (2, 4), (33, 64), 0


def read_items(pieces: tuple[str, ...]) -> dict[str, str]:
    """Return the items of one list by their numbers, whatever its name."""
    return dict(re.findall(r"(\d+) (\w+)", "".join(pieces)))


def answers_by_place(instance: Instance) -> list[str | None]:
    """Answer every question from the list that ends at the first meta-token, and the question's number alone."""
    end = instance.pieces.index(META)
    start = max(index for index, piece in enumerate(instance.pieces[:end]) if piece.strip() == "List")
    items = read_items(instance.pieces[start:end])
    # without the word after "of"
    return [items.get(number) for number in re.findall(r"Item (\d+) of \w+ is", instance.prompt_text)]


def shares(instance: Instance) -> tuple[float, float, float]:
    """Return the shares of right answers of the three solvers on one instance."""
    answers = instance.answers
    body = [piece for piece in instance.pieces[: instance.body_stop] if piece != META]
    end = instance.pieces.index(META)
    start = max(index for index, piece in enumerate(instance.pieces[:end]) if piece.strip() == "List")
    marked = list(read_items(instance.pieces[start:end]).values())
    every = [item for _, item in re.findall(r"(\d+) (\w+)", "".join(body))]
    right = [found == answer for found, answer in zip(answers_by_place(instance), answers, strict=True)]
    guesses = ([items.count(answer) / len(items) for answer in answers] for items in (marked, every))
    in_marked, in_prompt = (sum(guess) / len(answers) for guess in guesses)
    return sum(right) / len(answers), in_marked, in_prompt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instances", type=int, default=1_000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    encoder = PieceEncoder(TextEncoder(word_tokenizer()))
    difficulty = Difficulty(size=SIZE, prompt_tokens=PROMPT_TOKENS)
    found = [
        shares(make_instance(TASK, difficulty, encoder=encoder, seed=SEED, split="test", index=index))
        for index in range(options.instances)
    ]
    by_place, in_marked, in_prompt = (sum(column) / len(found) for column in zip(*found, strict=True))
    report = {
        "command": "python " + " ".join(sys.argv),
        "task": TASK.model_dump(mode="json"),
        "size": SIZE,
        "prompt_tokens": PROMPT_TOKENS,
        "instances": options.instances,
        "instances_right_by_place": sum(one[0] == 1 for one in found),
        "accuracy": {
            "by_place": by_place,
            "in_marked_list": round(in_marked, 4),
            "in_whole_prompt": round(in_prompt, 4),
        },
    }
    text = json.dumps(report, indent=1) + "\n"
    if options.out:
        options.out.write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
