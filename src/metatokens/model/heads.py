"""The decoder under transformers' heads for sequence classification, token classification and question answering.

Their rows hold meta-tokens like any others. Sequence classification reads the last token that is not padding, which may
be a meta-token. Labels of tokens and positions of answers count meta-tokens; the label of a meta-token should be -100.
"""

from typing import Any

from transformers import MODEL_MAPPING, AutoModel

from .compatibility import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from .modeling import MetaTokenModel, MetaTokenPreTrainedModel


class _FindsItsDecoder:
    """Registers the decoder with `AutoModel`, through which the generic classes make it.

    Remote code is loaded as a copy with a config class of its own, which `AutoModel` does not know yet.
    """

    accepts_loss_kwargs = False  # the losses are means over a batch, so Trainer must divide the accumulated ones

    def __init__(self, config: Any) -> None:
        if type(config) not in MODEL_MAPPING:
            AutoModel.register(type(config), MetaTokenModel)
        super().__init__(config)  # type: ignore[call-arg]


class MetaTokenForSequenceClassification(_FindsItsDecoder, GenericForSequenceClassification, MetaTokenPreTrainedModel):
    """A label for each sequence."""


class MetaTokenForTokenClassification(_FindsItsDecoder, GenericForTokenClassification, MetaTokenPreTrainedModel):
    """A label for each token."""


class MetaTokenForQuestionAnswering(_FindsItsDecoder, GenericForQuestionAnswering, MetaTokenPreTrainedModel):
    """The first and the last token of an answer."""
