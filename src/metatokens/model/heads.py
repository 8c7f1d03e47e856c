"""The decoder under transformers' heads for sequence classification, token classification and question answering.

Their rows hold meta-tokens like any others. A sequence is read at its last token that is no padding, a meta-token if
one stands there; labels of tokens and positions of answers count meta-tokens, and at a meta-token a label should be
-100.
"""

from transformers import AutoModel
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)

from .configuration import MetaTokenConfig
from .modeling import MetaTokenModel, MetaTokenPreTrainedModel

# the generic classes make their decoder through AutoModel, as remote code too, where nothing else has registered it
AutoModel.register(MetaTokenConfig, MetaTokenModel, exist_ok=True)


class MetaTokenForSequenceClassification(GenericForSequenceClassification, MetaTokenPreTrainedModel):
    """A label for each sequence."""

    accepts_loss_kwargs = False  # its loss is a mean whatever Trainer counts; Trainer divides accumulated ones itself


class MetaTokenForTokenClassification(GenericForTokenClassification, MetaTokenPreTrainedModel):
    """A label for each token."""

    accepts_loss_kwargs = False


class MetaTokenForQuestionAnswering(GenericForQuestionAnswering, MetaTokenPreTrainedModel):
    """The first and the last token of an answer."""

    accepts_loss_kwargs = False
