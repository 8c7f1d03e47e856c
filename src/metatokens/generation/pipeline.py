"""The pipeline task `meta-token-text-generation`: text generation with meta-tokens on a schedule.

    pipeline("meta-token-text-generation", model=path, meta_schedule={"kind": "periodic", "text_tokens": 9})

The models of this package follow the schedule of their generation config under `text-generation` too. This task insists
on a schedule, and also gives meta-tokens to models of other packages that know one.
"""

from typing import Any

from transformers import AutoModelForCausalLM, TextGenerationPipeline, pipelines

from metatokens.generation.decoding import follow_schedule
from metatokens.model.schedule import read_schedule

TASK = "meta-token-text-generation"


class MetaTokenTextGenerationPipeline(TextGenerationPipeline):
    """Text generation with meta-tokens; takes the arguments of transformers' pipeline, and `meta_schedule`."""

    def __init__(self, model: Any, *arguments: Any, meta_schedule: Any = None, **options: Any) -> None:
        """Take the model and its schedule: a mapping, a kind or a schedule; by default that of the generation config.

        Raises:
            ValueError: if there is neither, or the model has no meta-token.
        """
        follow_schedule(model, meta_schedule)
        if read_schedule(getattr(model.generation_config, "meta_schedule", None)) is None:
            raise ValueError(f"the task {TASK} needs a meta_schedule, and the model's generation config has none")
        super().__init__(model, *arguments, **options)


pipelines.PIPELINE_REGISTRY.register_pipeline(
    TASK, pipeline_class=MetaTokenTextGenerationPipeline, pt_model=AutoModelForCausalLM, type="text"
)
