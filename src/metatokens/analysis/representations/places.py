"""Whose states are read: meta-tokens, the text tokens right before them, and ordinary tokens in their places."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from metatokens.analysis.inputs.documents import Document
from metatokens.analysis.inputs.subject import Inputs
from metatokens.errors import UsageError


class Places(NamedTuple):
    """Places of one kind in some documents."""

    name: str
    documents: Sequence[Document]
    ends: Sequence[Tensor]
    """(1, T) bool for each document: the positions before which the text ends."""
    steps_back: int = 0
    """How many positions before the end of the prefix the state is read."""

    def by_document(self) -> list[tuple[int, Tensor, Tensor]]:
        """Return number, ids and ends of each document that has such a place.

        Raises:
            UsageError: none has.
        """
        found = [
            (number, document.input_ids, ends)
            for number, (document, ends) in enumerate(zip(self.documents, self.ends, strict=True))
            if ends.any()
        ]
        if not found:
            raise UsageError(
                f"states of a {self.name}",
                expected="a document that has one",
                found="none",
                remedy="choose documents that have meta-tokens",
            )
        return found


def places_of(inputs: Inputs) -> list[Places]:
    """Return the places whose states are compared; of a text, ordinary tokens in the places of meta-tokens too."""
    documents, control = inputs.subject.documents, inputs.subject.control
    metas = [document.is_meta for document in documents]
    # a meta-token right behind another has no text token of its own before it
    behind_text = [at & ~torch.nn.functional.pad(at, (1, 0))[:, :-1] for at in metas]
    found = [Places("meta-token", documents, metas), Places("token before it", documents, behind_text, steps_back=1)]
    if control:
        elsewhere = [at & ~other.is_meta for at, other in zip(metas, control, strict=True)]
        found.append(Places("ordinary token", control, elsewhere))
    return found
