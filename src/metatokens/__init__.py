"""Language models with learned meta-tokens: pre-train, evaluate and use them as Hugging Face models.

Public names are imported on first use, so that `import metatokens` alone loads no torch. The model is registered with
transformers' Auto classes as soon as those are imported.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from metatokens.registration import register_with_transformers

if TYPE_CHECKING:
    from metatokens.config.loading import load_preset as load_preset
    from metatokens.config.schema import NoInjection as NoInjection
    from metatokens.config.schema import PeriodicInjection as PeriodicInjection
    from metatokens.config.schema import UniformInjection as UniformInjection
    from metatokens.data.collator import MetaTokenCollator as MetaTokenCollator
    from metatokens.data.injection import inject_into_prompt as inject_into_prompt
    from metatokens.data.injection import inject_meta_tokens as inject_meta_tokens
    from metatokens.data.injection import sample_meta_positions as sample_meta_positions
    from metatokens.data.prepare import prepare as prepare
    from metatokens.evaluation.perplexity import measure_perplexity as measure_perplexity
    from metatokens.generation.decoding import generate_text as generate_text
    from metatokens.model import MetaTokenConfig as MetaTokenConfig
    from metatokens.model import MetaTokenForCausalLM as MetaTokenForCausalLM
    from metatokens.model import MetaTokenForQuestionAnswering as MetaTokenForQuestionAnswering
    from metatokens.model import MetaTokenForSequenceClassification as MetaTokenForSequenceClassification
    from metatokens.model import MetaTokenForTokenClassification as MetaTokenForTokenClassification
    from metatokens.model import MetaTokenModel as MetaTokenModel
    from metatokens.training.pretraining import pretrain as pretrain

__version__ = "0.1.0"

register_with_transformers()

_HOMES = {
    "MetaTokenCollator": "metatokens.data.collator",
    "MetaTokenConfig": "metatokens.model",
    "MetaTokenForCausalLM": "metatokens.model",
    "MetaTokenForQuestionAnswering": "metatokens.model",
    "MetaTokenForSequenceClassification": "metatokens.model",
    "MetaTokenForTokenClassification": "metatokens.model",
    "MetaTokenModel": "metatokens.model",
    "NoInjection": "metatokens.config.schema",
    "PeriodicInjection": "metatokens.config.schema",
    "UniformInjection": "metatokens.config.schema",
    "generate_text": "metatokens.generation.decoding",
    "inject_into_prompt": "metatokens.data.injection",
    "inject_meta_tokens": "metatokens.data.injection",
    "load_preset": "metatokens.config.loading",
    "measure_perplexity": "metatokens.evaluation.perplexity",
    "prepare": "metatokens.data.prepare",
    "pretrain": "metatokens.training.pretraining",
    "sample_meta_positions": "metatokens.data.injection",
}
__all__ = ["__version__", *sorted(_HOMES)]  # noqa: PLE0604 - every name is a string


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'metatokens' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
