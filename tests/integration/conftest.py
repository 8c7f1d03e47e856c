"""A small repetitive corpus and its tokens, made once."""

from pathlib import Path

import pytest
from small_corpus import prepare_corpus


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_corpus(tmp_path_factory.mktemp("corpus"), num_documents=40, vocab_size=300)


@pytest.fixture(scope="session")
def other_tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same kind of text with another vocabulary."""
    return prepare_corpus(tmp_path_factory.mktemp("other"), num_documents=40, vocab_size=280)
