"""The decoder under transformers' heads for sequence classification, token classification and question answering.

Their rows hold meta-tokens like any others. A sequence is read at its last token that is no padding, a meta-token if
one stands there; labels of tokens and positions of answers count meta-tokens, and at a meta-token a label should be
-100.
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
    """Lets a generic class make its decoder, which it does through `AutoModel`.

    As remote code the class of a config is one of several copies of it, of which `AutoModel` knows none.
    """

    accepts_loss_kwargs = False  # the losses are means whatever Trainer counts; it then divides accumulated ones itself

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
