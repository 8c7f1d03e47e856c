"""How fast is the data pipeline: tokenising, `prepare`, injection and the loader?

`benchmarks/data_pipeline.py` asks the same of a large text, on one core and on all.
"""

import tempfile
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from metatokens.bench.measuring import BenchResult, Contender, Pair, Registry, Work, measure, quiet, set_threads
from metatokens.bench.turns import timed
from metatokens.config.bench import DataBench
from metatokens.config.schema import UniformInjection
from metatokens.data.injection import inject_meta_tokens, sample_meta_positions
from metatokens.data.loader import BatchLoader, TokenBlocks
from metatokens.data.prepare import prepare
from metatokens.data.shards import TokenDataset
from metatokens.data.sources import SourceOptions, iterate_documents
from metatokens.data.tokenizer import TextEncoder, load_text_tokenizer

REGISTRY = Registry()
PAIRS = (Pair("tokenise", "tokenizers"), Pair("prepare_text", "tokenise"), Pair("loader", "inject"))
CALLS = 20  # of what takes about a millisecond
SHARD_TOKENS = 1 << 28
WRITTEN_BYTES = 16  # of a position: an id and a target
VOCABULARY = 8_192  # of a tokenizer that is trained


class Prepared(NamedTuple):
    """What the contenders work on."""

    settings: DataBench
    folder: Path
    """A dataset of the text."""
    scratch: Path
    """For what contenders write."""
    texts: list[str]
    """The beginning of the text."""

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of `texts`."""
        return sum(len(text.encode()) for text in self.texts)


def run(settings: DataBench, say: Callable[[str], None] = quiet) -> BenchResult:
    """Measure; `say` is told of the progress."""
    names, not_run = REGISTRY.choose(settings.contenders)
    set_threads(settings)
    with tempfile.TemporaryDirectory() as folder:
        say(f"preparing {settings.text}")
        prepared = make_prepared(settings, Path(folder))
        contenders = {name: REGISTRY[name](prepared) for name in names}
        return measure("data", settings, REGISTRY, contenders, pairs=PAIRS, not_run=not_run, say=say)


def make_prepared(settings: DataBench, folder: Path) -> Prepared:
    """Prepare the text in a folder, with the tokenizer that is named or one that is trained on it."""
    _prepare(settings.text, folder / "tokens", settings.tokenizer)
    texts, taken = [], 0
    for document in iterate_documents(settings.text):
        texts.append(document.text)
        taken += len(document.text.encode())
        if taken >= settings.megabytes * 1e6:
            break
    return Prepared(settings, folder / "tokens", folder, texts)


@REGISTRY.add()
def tokenise(prepared: Prepared) -> Contender:
    """The encoder of this package, on the beginning of the text."""
    encoder = TextEncoder(load_text_tokenizer(str(prepared.folder)))
    num_tokens = sum(map(len, encoder.encode_batch(prepared.texts)))
    return _once(lambda: encoder.encode_batch(prepared.texts), num_tokens, prepared.num_bytes)


@REGISTRY.add()
def tokenizers(prepared: Prepared) -> Contender:
    """The same vocabulary by the package tokenizers."""
    plain = Tokenizer.from_str(load_text_tokenizer(str(prepared.folder)).to_str())
    encode = partial(plain.encode_batch_fast, prepared.texts, add_special_tokens=False)
    return _once(encode, sum(len(one.ids) for one in encode()), prepared.num_bytes)


@REGISTRY.add()
def prepare_text(prepared: Prepared) -> Contender:
    """`prepare` of the whole text, its tokenizer given: read, encode, write, verify."""
    numbers = count()

    def work() -> None:
        _prepare(prepared.settings.text, prepared.scratch / f"again-{next(numbers)}", str(prepared.folder))

    with TokenDataset.open(prepared.folder) as dataset:
        num_tokens = sum(shard.num_tokens for shard in dataset.manifest.shards)
    return _once(work, num_tokens, 0)


@REGISTRY.add()
def inject(prepared: Prepared) -> Contender:
    """Places of meta-tokens, and batches with them."""
    settings = prepared.settings
    injection = UniformInjection(ratio=settings.ratio)
    num_text = settings.length - injection.num_meta(settings.length)
    text = np.random.default_rng(0).integers(VOCABULARY, size=(settings.rows, num_text + 1))
    sample_ids = np.arange(settings.rows)

    def work() -> None:
        positions = sample_meta_positions(injection, sample_ids=sample_ids, block_size=settings.length, seed=0, epoch=0)
        inject_meta_tokens(text, positions, meta_token_id=VOCABULARY, loss_policy="skip")

    return _often(work, settings, num_text)


@REGISTRY.add()
def loader(prepared: Prepared) -> Contender:
    """Batches of the loader: blocks of the text, with meta-tokens."""
    settings = prepared.settings
    injection = UniformInjection(ratio=settings.ratio)
    dataset = TokenDataset.open(prepared.folder)
    num_text = settings.length - injection.num_meta(settings.length)
    batches = BatchLoader(
        TokenBlocks(dataset, "train", num_text),
        injection=injection,
        block_size=settings.length,
        batch_blocks=settings.rows,
        seed=0,
        meta_token_id=dataset.vocab_size,
        loss_policy="skip",
    )
    steps = count()
    return _often(lambda: batches.batch_at(next(steps)), settings, num_text)


def _prepare(source: str, out: Path, tokenizer: str | None) -> None:
    prepare(
        source,
        out,
        tokenizer=tokenizer,
        vocab_size=VOCABULARY,
        validation_fraction=0,
        shard_tokens=SHARD_TOKENS,
        options=SourceOptions(),
    )


def _once(work: Callable[[], object], num_tokens: int, num_bytes: int) -> Contender:
    return Contender(
        lambda: {"text": timed(work)},
        {"text": Work(num_tokens, num_tokens, moved_bytes=num_bytes)},
        {"text_bytes": num_bytes} if num_bytes else {},
    )


def _often(work: Callable[[], object], settings: DataBench, num_text: int) -> Contender:
    """Return the contender of something that makes a batch, many times a turn."""

    def repeat() -> None:
        for _ in range(CALLS):
            work()

    rows = CALLS * settings.rows
    size = Work(rows * num_text, rows * settings.length, moved_bytes=rows * settings.length * WRITTEN_BYTES)
    return Contender(lambda: {"batches": timed(repeat)}, {"batches": size})
