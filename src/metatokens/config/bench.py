"""The settings of `metatokens bench`: a class for each question, whose fields are overrides on the command line."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from metatokens.config.base import Frozen
from metatokens.config.injection import DEFAULT_META_RATIO

Precision = Literal["float32", "bfloat16"]


class Bench(Frozen):
    """What every question has."""

    contenders: tuple[str, ...] | None = None
    """Those that take part, such as [meta, plain]; off means all whose packages are installed."""
    rounds: int = Field(7, ge=1)
    """Rounds that count; in each, every contender has one turn."""
    warmup: int = Field(1, ge=0)
    """Rounds before these, which do not count."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the models run."""
    threads: int | None = Field(None, ge=1)
    """Threads of torch on the CPU; off leaves them as they are."""


class ShapeBench(Bench):
    """What the questions about models have; the defaults are GPT-2's small width."""

    hidden_size: int = Field(768, ge=1)
    """C: width of the residual stream."""
    num_hidden_layers: int = Field(4, ge=1)
    """Number of blocks."""
    num_attention_heads: int = Field(12, ge=1)
    """H: heads of both attentions."""
    vocabulary: int = Field(8_192, ge=2)
    """Text tokens; GPT-2's are 50257."""
    ratio: float = Field(DEFAULT_META_RATIO, gt=0, lt=1)
    """Share k of meta-tokens among the positions."""

    @model_validator(mode="after")
    def _check_heads(self) -> Self:
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of 2 x num_attention_heads "
                f"{self.num_attention_heads}"
            )
        return self


class ModelBench(ShapeBench):
    """What the questions about models have that train or write."""

    precision: Precision = "float32"
    """bfloat16: training under autocast, generation with weights of that type."""
    attention: Literal["sdpa", "eager", "flex_attention", "flash_attention_2"] = "sdpa"
    """Attention backend of the models of this package and of transformers."""


class StepBench(ModelBench):
    """What the questions about a training step have."""

    length: int = Field(1_024, ge=8)
    """T: positions of a sequence, meta-tokens included."""
    rows: int = Field(1, ge=1)
    """B: sequences of a step."""
    compile: bool = False
    """Run the models under torch.compile; give at least two rounds of warm-up."""


class TrainingBench(StepBench):
    """What does a training step cost, with and without meta-tokens, here and elsewhere?"""

    parts: tuple[Literal["decoder", "whole"], ...] = Field(("decoder", "whole"), min_length=1)
    """decoder: forward and backward pass without the head; whole: with head and loss, and AdamW."""


class MemoryBench(StepBench):
    """How much memory does a training step take at its peak, with and without meta-tokens?"""

    rounds: int = Field(3, ge=1)
    """Processes of each contender."""
    warmup: int = Field(0, ge=0)
    """Rounds before these, which do not count."""


class GenerationBench(ModelBench):
    """How fast is generation, with and without meta-tokens?"""

    num_hidden_layers: int = Field(12, ge=1)
    """Number of blocks."""
    vocabulary: int = Field(50_257, ge=2)
    """Text tokens; by default GPT-2's."""
    prompt: int = Field(1_024, ge=1)
    """Text tokens of the longest prompt."""
    new: int = Field(64, ge=2)
    """Text tokens to write, about."""
    batch: int = Field(1, ge=1)
    """Prompts at a time; their lengths rise evenly to the longest."""


class LongBench(ModelBench):
    """How fast does a model write behind a long text, and what memory does it take to read it?"""

    hidden_size: int = Field(256, ge=1)
    """C: width of the residual stream."""
    num_attention_heads: int = Field(4, ge=1)
    """H: heads of both attentions."""
    length: int = Field(32_768, ge=2)
    """Positions to read, meta-tokens included, at least; the text ends with a meta-token."""
    chunks: tuple[Annotated[int, Field(ge=1)], ...] = Field((512,), min_length=1)
    """Positions that are read at a time; each is tried for its memory, the first reads the text for decoding."""
    prefills: int = Field(1, ge=0)
    """Processes of each contender that read the text, for their time and memory; 0 leaves them out."""
    new: int = Field(36, ge=1)
    """Text tokens to write in a turn, at least; a turn ends with a meta-token. The text grows with each turn."""
    window: int = Field(256, ge=1)
    """Tokens of text that a token sees in memory mode."""
    num_sinks: int = Field(4, ge=0)
    """First tokens that it sees."""


class AnalysisBench(ShapeBench):
    """What do statistics of attention rows cost beside the forward pass?"""

    num_hidden_layers: int = Field(12, ge=1)
    """Number of blocks."""
    vocabulary: int = Field(50_257, ge=2)
    """Text tokens; by default GPT-2's."""
    length: int = Field(1_024, ge=8)
    """T: positions, meta-tokens included."""
    rounds: int = Field(3, ge=1)
    """Rounds that count; in each, every contender has one turn."""


class DataBench(Bench):
    """How fast is the data pipeline?"""

    device: Literal["cpu"] = "cpu"
    """Where it runs."""
    text: str = "python-docs"
    """A file or folder of text, or another source of `metatokens prepare`."""
    tokenizer: str | None = None
    """As for `metatokens prepare`; off trains one on the text."""
    megabytes: float = Field(4.0, gt=0)
    """Text that is encoded without being written."""
    length: int = Field(1_024, ge=8)
    """T: positions of a block; 1,024 are the paper's."""
    rows: int = Field(64, ge=1)
    """Blocks of a batch."""
    ratio: float = Field(DEFAULT_META_RATIO, gt=0, lt=1)
    """Share k of meta-tokens among the positions."""
