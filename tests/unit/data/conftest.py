"""Text, a tokenizer and shards that the data tests share; all generated here, nothing downloaded."""

import os

# before anything imports the hub's client, so that the tests prove offline operation
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from metatokens.data.prepare import prepare
from metatokens.data.shards import TokenDataset
from metatokens.data.sources import SourceOptions
from metatokens.data.tokenizer import train_tokenizer
from metatokens.errors import MetaTokensError

Fails = Callable[..., AbstractContextManager[None]]


def make_texts(num_texts: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    syllables = ["ka", "lo", "mi", "tre", "un", "shé", "юж", "x1"]
    words = ["".join(rng.choice(syllables, rng.integers(1, 4))) for _ in range(200)]
    ends = [" ", " ", " ", ", ", ". ", ";\n"]
    return ["".join(rng.choice(words) + rng.choice(ends) for _ in range(rng.integers(5, 60))) for _ in range(num_texts)]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return make_texts(120)


@pytest.fixture(scope="session")
def tokenizer(texts: list[str]) -> Tokenizer:
    return train_tokenizer(texts, 400)


@pytest.fixture(scope="session")
def tokenizer_file(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="session")
def corpus(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for i, text in enumerate(texts):
        (folder / f"{i:03d}.txt").write_text(text)
    return folder


@pytest.fixture(scope="session")
def prepared_once(corpus: Path, tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "tokens"
    prepare(
        str(corpus),
        out,
        tokenizer=str(tokenizer_file),
        vocab_size=400,
        validation_fraction=0.2,
        shard_tokens=1000,
        options=SourceOptions(),
    )
    return out


@pytest.fixture
def prepared(prepared_once: Path, tmp_path: Path) -> Path:
    return shutil.copytree(prepared_once, tmp_path / "tokens")


@pytest.fixture
def dataset(prepared: Path) -> Iterator[TokenDataset]:
    with TokenDataset.open(prepared) as dataset:
        yield dataset


@pytest.fixture
def fails() -> Fails:
    """Context that demands an error with this exit code, on one line that has these words."""

    @contextmanager
    def fails(exit_code: int, *words: object) -> Iterator[None]:
        with pytest.raises(MetaTokensError) as caught:
            yield
        message = str(caught.value)
        assert caught.value.exit_code == exit_code
        assert "\n" not in message
        for word in (*words, "expected", "found"):
            assert str(word) in message

    return fails
