"""What measures are taken of in the tests of the analysis: passages of random text with meta-tokens in a tiny model."""

from typing import Any

import torch

from metatokens.analysis.inputs.documents import Document
from metatokens.analysis.inputs.subject import Inputs, Subject
from metatokens.analysis.measures import record_of, run_measure
from metatokens.analysis.results import Record
from metatokens.analysis.run import MEASURES
from metatokens.config.analysis import AnalysisConfig, TaskSubject, TextSubject
from metatokens.config.tasks import Difficulty, ListRecallTask
from task_drawing import word_tokenizer
from tiny_models import META, tiny_model

NUM_DOCUMENTS, LENGTH, NUM_META = 10, 40, 6
TASK = TaskSubject(
    task=ListRecallTask(questions=1),
    difficulty=Difficulty(size=(2, 4), prompt_tokens=(20, 60)),
    fitted_instances=60,
)


def document(number: int, draw: int = 0, length: int = LENGTH) -> Document:
    """Return a text with six meta-tokens; another draw puts them elsewhere."""
    text = torch.randint(1, META - 1, (LENGTH - NUM_META,), generator=torch.Generator().manual_seed(number))
    is_meta = torch.zeros(1, LENGTH, dtype=torch.bool)
    order = torch.randperm(LENGTH - 1, generator=torch.Generator().manual_seed(1_000 * draw + number))
    is_meta[0, 1 + order[:NUM_META]] = True
    ids = torch.full_like(is_meta, META, dtype=torch.int64).masked_scatter(~is_meta, text)
    return Document(f"text {number}", ids[:, :length], is_meta[:, :length])


def text_inputs(model: Any = None, *, length: int = LENGTH, **changes: Any) -> Inputs:
    """Return ten passages of text, six for calibration, and the control of the ten."""
    config = AnalysisConfig(subject=TextSubject(source="-"), documents=NUM_DOCUMENTS, **changes)
    numbers = range(NUM_DOCUMENTS)
    subject = Subject(
        documents=[document(number, length=length) for number in numbers],
        calibration=[document(100 + number, length=length) for number in range(6)],
        control=[document(number, 1, length) for number in numbers],
        instances=[],
    )
    return Inputs(tiny_model() if model is None else model, word_tokenizer(), config, subject)


def task_inputs(model: Any = None, **changes: Any) -> Inputs:
    """Return inputs of a task without a document, for what a test provides itself."""
    config = AnalysisConfig(**{"subject": TASK, "documents": 8, **changes})
    return Inputs(tiny_model() if model is None else model, word_tokenizer(), config, Subject([], [], [], []))


def records_of(name: str, inputs: Inputs, **at: Any) -> list[Record]:
    """Return the records of a measure whose coordinates include the given ones."""
    chosen = MEASURES[name]
    records = [record_of(chosen, row, seed=0) for row in run_measure(chosen, inputs)]
    return [one for one in records if at.items() <= one.at.items()]


def value_of(name: str, inputs: Inputs, **at: Any) -> float:
    """Return the value of the one record of a measure at these coordinates."""
    (found,) = [one for one in records_of(name, inputs) if one.at == at]
    assert found.value is not None
    return found.value
