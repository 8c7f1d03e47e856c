"""What an analysis looks at: a model, and instances of a recall task or passages of texts with meta-tokens injected.

Passages for a grafted model are plain text, since it puts its anchors between the tokens by itself.

A passage begins at a drawn place, one a text: the beginnings of books are licences and title pages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from torch import Tensor

from metatokens.analysis.inputs.documents import Document
from metatokens.config.analysis import AnalysisConfig, GraftSubject, TaskSubject, TextSubject
from metatokens.config.schema import UniformInjection
from metatokens.data.injection import inject_into_prompt
from metatokens.data.keyed_random import Purpose, hash_key
from metatokens.data.sources import iterate_documents
from metatokens.data.tokenizer import TextEncoder
from metatokens.errors import NumericError, UsageError
from metatokens.evaluation.recall import make_test_instances
from metatokens.graft.grafting import graft_of
from metatokens.lens.lens import Lens
from metatokens.tasks.base import PieceEncoder
from metatokens.tasks.encoding import EncodedInstance

_Made = TypeVar("_Made")
_CHARACTERS_PER_TOKEN = 16  # more than a window needs of any text


@dataclass(frozen=True)
class Subject:
    """What a model is looked at on."""

    documents: list[Document]
    calibration: list[Document]
    """Other documents."""
    control: list[Document]
    """The texts of `documents` with as many meta-tokens elsewhere; empty for a task, whose places mean something."""
    instances: list[EncodedInstance]
    """Of a task, one a document."""


class Inputs:
    """What measures look at, a model under a lens and its documents, and what they leave beside their rows.

    Attributes:
        model: The model.
        lens: On the model; a graft has none, since a lens knows no columns but those of its input.
        config: Of the analysis.
        subject: The documents.
        tokenizer: The model's.
        encoder: Of texts, by that tokenizer.
        meta_token_id: Of the model; a graft has none.
        skipped: What was left out, each with its reason.
        arrays: What is too large for rows, by name.
    """

    def __init__(
        self, model: Any, tokenizer: Tokenizer, config: AnalysisConfig, subject: Subject | None = None
    ) -> None:
        """Draw the documents that the config asks for, unless a subject of one's own is given.

        Raises:
            UsageError: A model without meta-tokens, too few or too short documents.
            ValueError: A model in training mode.
        """
        self.model = getattr(model, "wrapped", model)
        self.config = config
        self.tokenizer = tokenizer
        self.encoder = TextEncoder(tokenizer)
        self.skipped: list[str] = []
        self.arrays: dict[str, npt.NDArray[Any]] = {}
        self._shared: dict[Callable[[Inputs], Any], Any] = {}
        if isinstance(config.subject, GraftSubject):
            if self.model.training:
                raise ValueError(
                    "the model is in training mode, where dropout changes its loss; call model.eval() first"
                )
            draw = _graft_subject
        else:
            self.lens = Lens(self.model)
            self.meta_token_id = check_model(self.model)
            draw = _task_subject if isinstance(config.subject, TaskSubject) else _text_subject
        self.subject = draw(self) if subject is None else subject

    @property
    def task(self) -> TaskSubject:
        """The task; ValueError where the subject is a text."""
        if not isinstance(self.config.subject, TaskSubject):
            raise ValueError('the subject is a text; declare a measure of tasks with subject="task"')
        return self.config.subject

    @property
    def text(self) -> TextSubject:
        """The texts; ValueError where the subject is a task."""
        if not isinstance(self.config.subject, TextSubject):
            raise ValueError('the subject is a task; declare a measure of texts with subject="text"')
        return self.config.subject

    @property
    def first_lost(self) -> int:
        """Place of the first token of text that does not see all text before it; a graft's alone."""
        graft = graft_of(self.model).config
        return graft.window + graft.num_sinks

    def skip(self, reason: str) -> None:
        """Say what is left out and why; the same reason of several measures is said once."""
        if reason not in self.skipped:
            self.skipped.append(reason)

    def provide(self, function: Callable[[Inputs], _Made], made: _Made) -> None:
        """Let a `shared` function return this and not run, such as minimal pairs or labelled states of one's own."""
        self._shared[function] = made


def shared(function: Callable[[Inputs], _Made]) -> Callable[[Inputs], _Made]:
    """Let a function of the inputs run once an analysis; an error that it raised is raised again."""

    @wraps(function)
    def once(inputs: Inputs) -> _Made:
        if once not in inputs._shared:
            try:
                inputs._shared[once] = function(inputs)
            except (UsageError, NumericError) as error:
                inputs._shared[once] = error
        made = inputs._shared[once]
        if isinstance(made, UsageError | NumericError):
            raise made
        return cast("_Made", made)

    return once


def check_model(model: Any) -> int:
    """Return the meta-token's id.

    Raises:
        UsageError: a model without meta-tokens.
    """
    meta_token_id = getattr(model.config, "meta_token_id", None)
    if meta_token_id is None:
        raise UsageError(
            "model", expected="one with a meta-token", found="none in its config", remedy="analyse another checkpoint"
        )
    return int(meta_token_id)


def _task_subject(inputs: Inputs) -> Subject:
    """Return instances of the test split, whole rows with their answers.

    Raises:
        UsageError: a task that places no meta-token.
    """
    config, subject, meta_token_id = inputs.config, inputs.task, inputs.meta_token_id
    instances = make_test_instances(
        subject.task,
        subject.difficulty,
        encoder=PieceEncoder(inputs.encoder),
        meta_token_id=meta_token_id,
        seed=config.seed,
        instances=config.documents + config.calibration_documents,
    )
    documents = [
        _document(f"instance {number}", torch.from_numpy(instance.input_ids), meta_token_id)
        for number, instance in enumerate(instances)
    ]
    if not any(bool(document.is_meta.any()) for document in documents):
        raise UsageError(
            "subject.task.meta_places",
            expected="places of meta-tokens",
            found=subject.task.meta_places.kind,
            remedy="analyse a model that was trained with them",
        )
    return Subject(documents[: config.documents], documents[config.documents :], [], instances[: config.documents])


def _text_subject(inputs: Inputs) -> Subject:
    """Return passages of `window` positions, one of each text that is long enough, up to the number in the config.

    Raises:
        UsageError: a window longer than the model, or too few texts that fill it.
    """
    config, subject, meta_token_id = inputs.config, inputs.text, inputs.meta_token_id
    of_model: Any = inputs.lens.model.config
    limit = getattr(of_model, "max_sequence_length", None) or of_model.max_position_embeddings
    if subject.window > limit:
        raise UsageError(
            "subject.window", expected=f"at most {limit}, the model's", found=str(subject.window), remedy="lower it"
        )
    injection = UniformInjection(ratio=subject.ratio)
    num_text = subject.window - injection.num_meta(subject.window)
    if num_text == subject.window:
        raise UsageError(
            "subject.ratio",
            expected=f"at least one meta-token in {subject.window} positions",
            found=f"none at {subject.ratio}",
            remedy="raise it, or subject.window",
        )
    wanted = config.documents + config.calibration_documents
    passages = _passages(inputs, subject, wanted, num_text)

    def inject(number: int, draw: int) -> Document:
        name, ids = passages[number]
        seed = int(hash_key(config.seed, number, Purpose.PASSAGE_INJECTION, draw)[0] >> np.uint64(1))
        row = inject_into_prompt(ids, injection, meta_token_id=meta_token_id, seed=seed)
        return _document(name, torch.tensor(row), meta_token_id)

    return Subject(
        documents=[inject(number, 0) for number in range(config.documents)],
        calibration=[inject(number, 0) for number in range(config.documents, wanted)],
        control=[inject(number, 1) for number in range(config.documents)],  # ordinary tokens at their places
        instances=[],
    )


def _graft_subject(inputs: Inputs) -> Subject:
    """Return passages of `window` tokens of text, one of each text that is long enough.

    Raises:
        UsageError: a window in which no anchor is seen, or longer than the model, or too few texts that fill it.
    """
    config, subject = inputs.config, inputs.config.subject
    assert isinstance(subject, GraftSubject)
    graft, limit = graft_of(inputs.model).config, inputs.model.config.max_position_embeddings
    least = graft.window + graft.num_sinks + graft.every
    if not least < subject.window <= limit:
        raise UsageError(
            "subject.window",
            expected=f"more than {least}, so that text sees an anchor, and at most {limit}, the model's",
            found=str(subject.window),
            remedy="change it",
        )
    passages = _passages(inputs, subject, config.documents, subject.window)
    rows = [(name, torch.tensor(ids)[None]) for name, ids in passages]
    return Subject([Document(name, row, torch.zeros_like(row, dtype=torch.bool)) for name, row in rows], [], [], [])


def _passages(
    inputs: Inputs, subject: TextSubject | GraftSubject, count: int, num_tokens: int
) -> list[tuple[str, list[int]]]:
    """Return source and ids of a passage of each of the first texts that are long enough.

    Raises:
        UsageError: there are fewer.
    """
    seed = inputs.config.seed
    found: list[tuple[str, list[int]]] = []
    num_seen = 0
    for document in iterate_documents(subject.source):
        passage = _passage(document.text, subject.window * _CHARACTERS_PER_TOKEN, seed=seed, number=num_seen)
        ids = np.asarray(inputs.encoder.encode_batch([passage])[0]).astype(np.int64).tolist()
        num_seen += 1
        if len(ids) >= num_tokens:
            found.append((document.source, ids[:num_tokens]))
        if len(found) == count:
            return found
    raise UsageError(
        f"texts of {subject.source}",
        expected=f"{count} of at least {num_tokens} tokens each",
        found=f"{len(found)} of {num_seen}",
        remedy="lower documents, calibration_documents or subject.window",
    )


def stack(documents: Sequence[Document]) -> Tensor:
    """Return documents of one length as one batch, (documents, T)."""
    return torch.cat([document.input_ids for document in documents])


def _passage(text: str, num_characters: int, *, seed: int, number: int) -> str:
    """Return a passage of this many characters, from a word at a drawn place on; all of a shorter text."""
    room = len(text) - num_characters
    if room <= 0:
        return text
    start = int(hash_key(seed, number, Purpose.PASSAGE)[0]) % (room + 1)
    behind = text[start : start + num_characters]
    return behind if start == 0 else behind.partition(" ")[2] or behind


def _document(name: str, ids: Tensor, meta_token_id: int) -> Document:
    row = ids[None].long()
    return Document(name, row, row == meta_token_id)
