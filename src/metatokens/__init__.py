"""Language models with learned meta-tokens: pre-train, evaluate and use them as Hugging Face models.

Public names are imported on first use, so that `import metatokens` alone loads no torch. The model is registered with
transformers' Auto classes as soon as those are imported.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from metatokens.registration import register_with_transformers

if TYPE_CHECKING:
    from metatokens.config.finetuning import EvaluateConfig as EvaluateConfig
    from metatokens.config.loading import load_preset as load_preset
    from metatokens.config.schema import ExplicitInjection as ExplicitInjection
    from metatokens.config.schema import ModelConfig as ModelConfig
    from metatokens.config.schema import NoInjection as NoInjection
    from metatokens.config.schema import PeriodicInjection as PeriodicInjection
    from metatokens.config.schema import PunctuationInjection as PunctuationInjection
    from metatokens.config.schema import ThoughtInjection as ThoughtInjection
    from metatokens.config.schema import UniformInjection as UniformInjection
    from metatokens.config.tasks import CopyingTask as CopyingTask
    from metatokens.config.tasks import ListPointerTask as ListPointerTask
    from metatokens.config.tasks import ListRecallTask as ListRecallTask
    from metatokens.config.tasks import ParityTask as ParityTask
    from metatokens.config.tasks import SegmentCountingTask as SegmentCountingTask
    from metatokens.data.collator import MetaTokenCollator as MetaTokenCollator
    from metatokens.data.injection import inject_into_prompt as inject_into_prompt
    from metatokens.data.injection import inject_meta_tokens as inject_meta_tokens
    from metatokens.data.injection import sample_meta_positions as sample_meta_positions
    from metatokens.data.prepare import prepare as prepare
    from metatokens.data.tokenizer import build_hf_tokenizer as build_hf_tokenizer
    from metatokens.data.tokenizer import load_text_tokenizer as load_text_tokenizer
    from metatokens.data.tokenizer import train_tokenizer as train_tokenizer
    from metatokens.evaluation.interventions import MeanEmbedding as MeanEmbedding
    from metatokens.evaluation.interventions import NoMetaAttention as NoMetaAttention
    from metatokens.evaluation.interventions import NoPositionEdges as NoPositionEdges
    from metatokens.evaluation.interventions import TokenEmbedding as TokenEmbedding
    from metatokens.evaluation.interventions import ZeroEmbedding as ZeroEmbedding
    from metatokens.evaluation.interventions import ZeroPosition as ZeroPosition
    from metatokens.evaluation.interventions import intervene as intervene
    from metatokens.evaluation.perplexity import measure_perplexity as measure_perplexity
    from metatokens.evaluation.recall import evaluate_recall as evaluate_recall
    from metatokens.evaluation.windows import PerplexityOptions as PerplexityOptions
    from metatokens.generation.compressed import CompressedDocument as CompressedDocument
    from metatokens.generation.decoding import MetaTokenSchedule as MetaTokenSchedule
    from metatokens.generation.decoding import NoSchedule as NoSchedule
    from metatokens.generation.decoding import PeriodicSchedule as PeriodicSchedule
    from metatokens.generation.decoding import ThoughtSchedule as ThoughtSchedule
    from metatokens.generation.decoding import UniformSchedule as UniformSchedule
    from metatokens.generation.decoding import generate_text as generate_text
    from metatokens.generation.decoding import generate_texts as generate_texts
    from metatokens.language_model import LanguageModel as LanguageModel
    from metatokens.language_model import load as load
    from metatokens.lens import Lens as Lens
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
    "CompressedDocument": "metatokens.generation.compressed",
    "CopyingTask": "metatokens.config.tasks",
    "EvaluateConfig": "metatokens.config.finetuning",
    "ExplicitInjection": "metatokens.config.schema",
    "LanguageModel": "metatokens.language_model",
    "Lens": "metatokens.lens",
    "ListPointerTask": "metatokens.config.tasks",
    "ListRecallTask": "metatokens.config.tasks",
    "MeanEmbedding": "metatokens.evaluation.interventions",
    "MetaTokenCollator": "metatokens.data.collator",
    "MetaTokenConfig": "metatokens.model",
    "MetaTokenForCausalLM": "metatokens.model",
    "MetaTokenForQuestionAnswering": "metatokens.model",
    "MetaTokenForSequenceClassification": "metatokens.model",
    "MetaTokenForTokenClassification": "metatokens.model",
    "MetaTokenModel": "metatokens.model",
    "MetaTokenSchedule": "metatokens.generation.decoding",
    "ModelConfig": "metatokens.config.schema",
    "NoInjection": "metatokens.config.schema",
    "NoMetaAttention": "metatokens.evaluation.interventions",
    "NoPositionEdges": "metatokens.evaluation.interventions",
    "NoSchedule": "metatokens.generation.decoding",
    "ParityTask": "metatokens.config.tasks",
    "PeriodicInjection": "metatokens.config.schema",
    "PeriodicSchedule": "metatokens.generation.decoding",
    "PerplexityOptions": "metatokens.evaluation.windows",
    "PunctuationInjection": "metatokens.config.schema",
    "SegmentCountingTask": "metatokens.config.tasks",
    "ThoughtInjection": "metatokens.config.schema",
    "ThoughtSchedule": "metatokens.generation.decoding",
    "TokenEmbedding": "metatokens.evaluation.interventions",
    "UniformInjection": "metatokens.config.schema",
    "UniformSchedule": "metatokens.generation.decoding",
    "ZeroEmbedding": "metatokens.evaluation.interventions",
    "ZeroPosition": "metatokens.evaluation.interventions",
    "build_hf_tokenizer": "metatokens.data.tokenizer",
    "evaluate_recall": "metatokens.evaluation.recall",
    "generate_text": "metatokens.generation.decoding",
    "generate_texts": "metatokens.generation.decoding",
    "inject_into_prompt": "metatokens.data.injection",
    "inject_meta_tokens": "metatokens.data.injection",
    "intervene": "metatokens.evaluation.interventions",
    "load": "metatokens.language_model",
    "load_preset": "metatokens.config.loading",
    "load_text_tokenizer": "metatokens.data.tokenizer",
    "measure_perplexity": "metatokens.evaluation.perplexity",
    "prepare": "metatokens.data.prepare",
    "pretrain": "metatokens.training.pretraining",
    "sample_meta_positions": "metatokens.data.injection",
    "train_tokenizer": "metatokens.data.tokenizer",
}
__all__ = ["__version__", *sorted(_HOMES)]  # noqa: PLE0604 - every name is a string


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'metatokens' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
