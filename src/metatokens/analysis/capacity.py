"""How much fits behind a meta-token: recall against the number of items that it stands for (E7).

In list recall a meta-token ends the list that is asked about. With the length of the prompt held, the lists get longer
and fewer; where accuracy breaks is an empirical limit of what the state holds, comparable with a rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from metatokens.evaluation.recall import RecallRow, evaluate_recall

if TYPE_CHECKING:
    from metatokens.config.finetuning import EvaluateConfig
    from metatokens.evaluation.interventions import Intervention
    from metatokens.tasks.base import PieceEncoder


def recall_by_items(
    models: Sequence[Any],
    config: EvaluateConfig,
    encoder: PieceEncoder,
    *,
    items: Sequence[int],
    interventions: Sequence[Intervention] = (),
) -> dict[int, tuple[RecallRow, ...]]:
    """Return the rows of `evaluate_recall` for each number of items; it takes the place of `config.size`.

    Raises:
        UsageError: A number of items that cannot fill one of the lengths.
    """
    return {
        number: evaluate_recall(
            models, config.model_copy(update={"size": (number, number)}), encoder, interventions=interventions
        )
        for number in items
    }
