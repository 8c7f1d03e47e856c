"""The loss of the text's own next tokens."""

from torch import Tensor

from metatokens.graft.objectives.objective import Pass, objective
from metatokens.model.loss import loss_and_logits


@objective()
def language_model(state: Pass) -> Tensor:
    """Return the summed negative log-probability of the next tokens."""
    loss, _ = loss_and_logits(
        state.head, state.states, state.targets, vocab_size=state.vocab_size, wants_logits=False, num_items_in_batch=1
    )
    assert loss is not None
    return loss
