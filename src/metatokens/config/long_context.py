"""The configuration of the long-context suite of `metatokens evaluate`."""

from typing import Literal

from pydantic import Field

from metatokens.config.base import Frozen, UserPath


class LongContextConfig(Frozen):
    """Which tasks at which lengths, and which caches are compared."""

    tasks: tuple[str, ...] = ("needle", "multi-key", "multi-value", "variables", "passkey", "copying")
    """Names of tasks: needle, multi-key, multi-value, variables, passkey, copying, babilong-qa1 to babilong-qa5."""
    lengths: tuple[int, ...] = Field((1_024,), min_length=1)
    """Lengths of prompt and answer together, in text tokens of the model's own tokenizer."""
    instances: int = Field(50, ge=1)
    """Texts of each task and length."""
    policies: tuple[str, ...] = Field(("full",), min_length=1)
    """What the cache keeps: full, window, sinks, every, separators, pooled. Each is compared with the first."""
    columns: int = Field(256, ge=1)
    """Columns that the cache of every policy but full may hold."""
    sinks: int = Field(4, ge=0)
    """First tokens that a policy keeps."""
    window: int | None = Field(None, ge=1)
    """Newest tokens of the policies every, separators and pooled; off means half of the columns."""
    haystack: Literal["noise", "books"] = "noise"
    """What the sentences of the tasks are hidden in: five sentences over and over, or books."""
    books: UserPath | None = None
    """File or folder of books, as for `prepare`: for haystack books, BABILong and loss_tokens."""
    babi: UserPath | None = None
    """Folder of the bAbI tasks in English, qa1_..._test.txt and so on, packed or not: for BABILong."""
    loss_tokens: int | None = Field(None, ge=2)
    """Tokens at the start of each book whose loss by distance is measured; off means none."""
    max_books: int | None = Field(None, ge=1)
    """Read at most this many books; off means all."""
    batch_size: int = Field(4, ge=1)
    """Texts of one forward pass."""
    chunk: int = Field(256, ge=1)
    """Tokens of a text that are read in one forward pass."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the texts and of the bootstrap over books."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU if there is one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of weights, keys and values; bfloat16 halves the bytes of a cache."""
