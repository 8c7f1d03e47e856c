"""lm-evaluation-harness with meta-tokens: the model `metatokens`, beside the harness's own models.

    python -m metatokens.evaluation.harness run --model metatokens --model_args pretrained=RUN/model --tasks ...

The harness's model `hf` scores plain text. This one puts meta-tokens into what it scores and generates, by the schedule
in the checkpoint's generation config or by `meta_schedule` among the model's arguments. Needs the extra
`metatokens[eval]`.
"""

from typing import Any

import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from metatokens.generation.decoding import follow_schedule
from metatokens.model.schedule import MetaSchedule, read_schedule, schedule_meta_tokens


@register_model("metatokens")
class MetaTokenLM(HFLM):
    """The harness's Hugging Face model, with meta-tokens on a schedule.

    A text token is scored by the logits right before it, which may be those of a meta-token. The meta-token itself is
    never a target. Every row of a batch has the same layout, because a schedule counts tokens and does not read them.
    """

    def __init__(self, pretrained: Any, meta_schedule: Any = None, **options: Any) -> None:
        """Load the model.

        Args:
            pretrained: as for `HFLM`.
            meta_schedule: a kind such as `none`, a mapping, or a schedule; by default that of the checkpoint.
            **options: as for `HFLM`.
        """
        super().__init__(pretrained, **options)
        follow_schedule(self.model, meta_schedule)

    @property
    def meta_schedule(self) -> MetaSchedule | None:
        """Where meta-tokens go."""
        return read_schedule(getattr(self.model.generation_config, "meta_schedule", None))

    @property
    def max_length(self) -> int:
        """Text tokens that fit the model's window beside their meta-tokens."""
        limit: int = super().max_length
        return sum(column <= limit for column in self._columns(limit)[1:])

    def _model_call(self, inps: Tensor, attn_mask: Any = None, labels: Any = None) -> Tensor:
        """Return the logits (B, N, V) that predict the text token after each of `inps` (B, N)."""
        columns = self._columns(inps.shape[1])
        ids = inps.new_full((len(inps), columns[-1]), self.model.config.meta_token_id or 0)
        ids[:, columns[:-1]] = inps
        logits: Tensor = super()._model_call(ids, attn_mask, labels)
        return logits[:, torch.tensor(columns[1:], device=logits.device) - 1]

    def _columns(self, num_text: int) -> list[int]:
        """Return the column of each text token, and of the one that would come next."""
        schedule = self.meta_schedule
        if schedule is None:
            return list(range(num_text + 1))
        layout = schedule_meta_tokens(range(num_text + 1), schedule, meta_token_id=-1)
        return [column for column, token in enumerate(layout) if token >= 0]


if __name__ == "__main__":
    cli_evaluate()
