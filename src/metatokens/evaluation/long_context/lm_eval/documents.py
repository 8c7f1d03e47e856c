r"""The texts of the suite as documents of lm-evaluation-harness, which loads this file from beside its task files.

    lm_eval run --model hf --model_args pretrained=MODEL --tasks long_context_needle --include_path FOLDER \
        --metadata '{"length": 1024, "instances": 50}'

FOLDER is this one. An answer is scored by whether it is the greedy one, which is the exact match of `suite`; so the
figures are those of `metatokens evaluate --suite long-context` under the policy full.
"""

from pathlib import Path
from typing import Any, Literal

from transformers import AutoTokenizer

from metatokens.evaluation.long_context.items import make_item
from metatokens.evaluation.long_context.material import Material
from metatokens.evaluation.long_context.subject import SubjectTokens
from metatokens.evaluation.long_context.tasks import find_task


def documents(
    *,
    task: str,
    pretrained: str | None = None,
    tokenizer: str | None = None,
    length: int = 1024,
    instances: int = 50,
    seed: int = 0,
    haystack: Literal["noise", "books"] = "noise",
    books: str | None = None,
    babi: str | None = None,
    max_books: int | None = None,
    **others: Any,
) -> dict[str, Any]:
    """Return the texts of a task as the only split, `test`; each has a prompt and an answer.

    Args:
        task: of the suite, named by the task file.
        pretrained: the model, whose tokenizer measures the texts; the harness passes on what `--model_args` say.
        tokenizer: the tokenizer, where it is not the model's.
        length: as in `LongContextConfig.lengths`.
        instances: as there.
        seed: as there.
        haystack: as there.
        books: as there.
        babi: as there.
        max_books: as there.
        others: what else the harness passes on.
    """
    from datasets import Dataset

    del others
    tokens = SubjectTokens(AutoTokenizer.from_pretrained(tokenizer or pretrained, trust_remote_code=False))
    material = Material(haystack=haystack, books=_path(books), babi=_path(babi), max_books=max_books)
    items = (
        make_item(find_task(task), length, encoder=tokens, material=material, seed=seed, index=index)
        for index in range(instances)
    )
    return {"test": Dataset.from_list([{"prompt": item.prompt, "answer": item.answer} for item in items])}


def _path(name: str | None) -> Path | None:
    return None if name is None else Path(name)
