"""Texts of every kind go to tokens and back: encoded, written as shards, read, injected, decoded, all bytes return.

Every plane of Unicode, control characters, runs without end, the strings of special tokens; and what no text may hold:
lone surrogates, NUL and a byte order mark, which are refused or replaced as the options say.
"""

import json
from pathlib import Path
from random import Random

import numpy as np
from campaign import Case, fault
from tokenizers import Tokenizer, pre_tokenizers

from metatokens.config.schema import PunctuationInjection, UniformInjection
from metatokens.data.injection import inject_into_prompt
from metatokens.data.loader import BatchLoader, TokenBlocks
from metatokens.data.prepare import prepare
from metatokens.data.shards import TokenDataset
from metatokens.data.sources import SourceOptions
from metatokens.data.splits import split_of
from metatokens.data.tokenizer import TextEncoder, ends_clause_table, train_tokenizer
from metatokens.errors import DataError

NUM_TEXTS, BLOCK = 100, 32
SPECIALS = (
    "<|endoftext|>",
    "_PAUSE_",
    " _PAUSE_",
    "<|pad|>",
    "</s>",
    "<eos>",
    "<|end_of_text|>",
    "<s>",
    "[MASK]",
    "<|endof",
)
# whole planes, and what lies badly: joiners, marks, directions, separators of lines, variation selectors, tags
RANGES = (
    (0x01, 0x1F),
    (0x20, 0x7E),
    (0x7F, 0x9F),
    (0xA0, 0xD7FF),
    (0xE000, 0xFFFD),
    (0x10000, 0x1FFFF),
    (0x20000, 0x10FFFF),
)
RANGES += ((0x300, 0x36F), (0x200B, 0x206F), (0xFE00, 0xFE0F), (0xE0000, 0xE01EF), (0x1F1E6, 0x1F1FF), (0x0600, 0x06FF))
BAD = ("\ud800", "\udfff", "a\udc80b", "\0", "\ufeffbegins with a mark")


def character(random: Random) -> str:
    return chr(random.randint(*random.choice(RANGES)))


def piece(random: Random) -> str:
    kind = random.randrange(8)
    if kind == 0:
        return random.choice(SPECIALS)
    if kind == 1:
        return random.choice([" ", "\n", "\t", "\r\n", "\u2028", "\u3000", "."]) * random.randint(1, 40)
    if kind == 2:
        return "the cat sat on the mat, " * random.randint(1, 3)
    return "".join(character(random) for _ in range(random.randint(1, 12)))


def text(random: Random) -> str:
    found = "".join(piece(random) for _ in range(random.randint(1, 10)))
    if random.random() < 0.02:  # a line that is very long
        found += random.choice([character(random), random.choice(SPECIALS), piece(random)]) * random.randint(
            1_000, 20_000
        )
    return found.removeprefix("\ufeff") or "."


def tokenizer_of(case: Case) -> Path:
    """Return a file with a tokenizer: one that tiktoken can follow, or one with a splitter that it cannot."""
    backend = case.random.choice(["tiktoken", "tokenizers"])
    path = case.shared / f"{backend}.json"
    if not path.exists():
        tokenizer = train_tokenizer((text(Random(seed)) for seed in range(2_000)), 600)
        if backend == "tokenizers":
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.ByteLevel(add_prefix_space=False)])
        tokenizer.save(str(path))
        assert TextEncoder(tokenizer).backend == backend
    case.tally[backend] += NUM_TEXTS
    return path


def write_rows(case: Case, texts: list[str]) -> Path:
    source = case.folder / "texts.jsonl"
    as_ascii = case.random.random() < 0.5 or any(0xD800 <= ord(one) < 0xE000 for one in "".join(texts))
    source.write_text(
        "".join(json.dumps({"text": one}, ensure_ascii=as_ascii) + "\n" for one in texts), "utf-8", newline=""
    )
    return source


def documents_of(dataset: TokenDataset, tokenizer: Tokenizer) -> dict[str, list[str]]:
    """Return the texts of each split, one before each end of text; no other id may be special."""
    found = {}
    for split in ("train", "validation"):
        ids = dataset.read(split, 0, dataset.num_tokens(split))
        assert ids.max() < dataset.vocab_size, "a text became a meta-token"
        ends = np.flatnonzero(ids == dataset.eos_token_id)
        assert ends[-1] == len(ids) - 1, "a split does not end with an end of text"
        pieces = [one[:-1].tolist() for one in np.split(ids, ends + 1)[:-1]]
        found[split] = tokenizer.decode_batch(pieces, skip_special_tokens=False)
    return found


def check_injection(case: Case, dataset: TokenDataset, tokenizer: Tokenizer) -> None:
    """Inject into blocks and into a prompt; without the meta-tokens all text is there, in order."""
    injection = case.random.choice([UniformInjection(ratio=0.25), PunctuationInjection(ratio=0.25)])
    table, meta_token_id = ends_clause_table(tokenizer), dataset.vocab_size
    blocks = TokenBlocks(dataset, "train", BLOCK - injection.num_meta(BLOCK))
    loader = BatchLoader(
        blocks,
        injection=injection,
        block_size=BLOCK,
        batch_blocks=1,
        seed=case.random.randrange(2**32),
        meta_token_id=meta_token_id,
        loss_policy="skip",
        ends_clause=table,
    )
    for step in range(min(len(blocks), 50)):
        (sample_ids, _), batch = loader.samples_at(step), loader.batch_at(step)
        is_text = batch.input_ids != meta_token_id
        assert batch.num_meta == (~is_text).sum() == injection.num_meta(BLOCK), "another number of meta-tokens"
        assert np.array_equal(batch.input_ids[is_text], blocks.read(sample_ids)[:, :-1].ravel()), "another text"
    ids = dataset.read("train", 0, min(dataset.num_tokens("train"), 500)).tolist()
    prompt = inject_into_prompt(
        ids, injection, meta_token_id=meta_token_id, seed=case.random.randrange(2**32), ends_clause=table
    )
    assert [one for one in prompt if one != meta_token_id] == ids, "a prompt lost text"


def to_shards(case: Case, texts: list[str], on_bad_text: str) -> Path:
    out = case.folder / f"tokens-{on_bad_text}"
    options = SourceOptions(on_bad_text=on_bad_text)  # type: ignore[arg-type]
    prepare(
        str(write_rows(case, texts)),
        out,
        tokenizer=str(tokenizer_of(case)),
        vocab_size=0,
        validation_fraction=0.2,
        shard_tokens=2_000,
        options=options,
    )
    return out


def refusal_of(case: Case, texts: list[str]) -> str:
    try:
        to_shards(case, texts, "error")
    except DataError as error:
        return str(error)
    raise AssertionError(f"{texts[-1]!a} was accepted in silence")


@fault(counts="texts there and back", times=500)
def send_texts_there_and_back(case: Case) -> int:
    texts = [text(case.random) for _ in range(NUM_TEXTS)]
    expected, on_bad_text = texts, "error"
    if case.random.random() < 0.3:
        bad = case.random.choice(BAD)
        case.tally[f"with {bad!a}"] += 1
        texts = [*texts, bad]
        assert f"row {len(texts)}:" in refusal_of(case, texts), "does not name the row"
        clean = bad.removeprefix("\ufeff")
        expected = [
            *expected,
            "".join("\ufffd" if one == "\0" or "\ud800" <= one <= "\udfff" else one for one in clean),
        ]
        on_bad_text = "replace"
    with TokenDataset.open(to_shards(case, texts, on_bad_text)) as dataset:
        tokenizer = dataset.tokenizer()
        found = documents_of(dataset, tokenizer)
        for split, documents in found.items():
            assert documents == [one for one in expected if split_of(one, 0.2) == split], f"other texts in {split}"
        check_injection(case, dataset, tokenizer)
    return NUM_TEXTS
