"""A small repetitive corpus and its tokens."""

from pathlib import Path

import numpy as np

from metatokens.data.prepare import prepare
from metatokens.data.sources import SourceOptions


def prepare_corpus(folder: Path, *, num_documents: int, vocab_size: int) -> Path:
    """Write documents that say a few sentences over and over, and tokenise them."""
    rng = np.random.default_rng(0)
    sentences = ["the cat sat on the mat. ", "a dog ran to the far hill, ", "and nobody knew why it was so.\n"]
    (folder / "text").mkdir()
    for i in range(num_documents):
        text = "".join(sentences[j] for j in rng.integers(0, len(sentences), 60))
        (folder / "text" / f"{i}.txt").write_text(f"story {i}: {text}")
    prepare(
        str(folder / "text"),
        folder / "tokens",
        tokenizer=None,
        vocab_size=vocab_size,
        validation_fraction=0.2,
        shard_tokens=5_000,
        options=SourceOptions(),
    )
    return folder / "tokens"
