"""Text to tokens and back: training, loading, bulk encoding, and the tokenizer that ships with a model.

Two tokenizers share one vocabulary. The *text tokenizer* (`tokenizers.Tokenizer`) has no meta-token. It encodes text
with its special tokens disabled, so no text can smuggle in a meta-token or an end of document. The *model tokenizer*
(`PreTrainedTokenizerFast`) adds the meta-token and padding after the text vocabulary, for prompts. Ids: text
0 .. V - 1, meta-token V, padding V + 1.

Added tokens that are not special, such as GPT-NeoX's runs of spaces, belong to the text vocabulary. Whenever one
tokenizer is made from another, the two are compared on a probe text: the bulk encoder, the text tokenizer, the model
tokenizer, and the tokenizer that transformers makes of the same folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from metatokens.data.byte_level import Specification, TokenIds, lost_bytes, tiktoken_encode
from metatokens.data.probe import PROBE_TEXT, plain_ids, require_equal_ids
from metatokens.data.special_tokens import END_OF_TEXT, META_TOKEN, PAD_TOKEN, end_of_text_token
from metatokens.errors import DataError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

    AnyTokenizer: TypeAlias = Tokenizer | PreTrainedTokenizerBase | str | Path
    """A text tokenizer, or what `as_text_tokenizer` makes one of."""

MAX_TOKENIZER_BYTES = 256 << 20  # a vocabulary of 256,000 tokens with its merges has about 35 MB

# BPE training takes quadratic time in the length of a piece, an unbroken run of letters, digits, space or signs
_LONG_PIECE = re.compile(r"[^\W\d_]{8192}|\d{8192}|\s{8192}|[^\w\s]{8192}|_{8192}")

_CLAUSE_ENDS = tuple(".,;:!?")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE with GPT-2's split pattern; equal texts in equal order give equal merges.

    `<|endoftext|>` has id 0, the 256 bytes follow, then the merges. The vocabulary is smaller than `vocab_size` if the
    texts hold too few pairs.

    Raises:
        UsageError: `vocab_size` leaves no room for the bytes and the end of text.
    """
    if vocab_size < 257:
        raise UsageError(
            "vocab_size",
            expected="at least 257 (256 bytes and the end of text)",
            found=str(vocab_size),
            remedy="raise vocab_size",
        )
    tokenizer = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_with_short_pieces(texts), trainer)
    return tokenizer


def load_text_tokenizer(source: str) -> Tokenizer:
    """Load a text tokenizer: no meta-token, no padding, no truncation, no tokens added around a text.

    Given the folder of a trained model, the result is byte for byte the text tokenizer of its training.

    Args:
        source: A run folder, a folder with `tokenizer.json`, a folder with GPT-2's `vocab.json` and `merges.txt`, a
            `tokenizer.json` file, or the id of a tokenizer on the Hugging Face hub.

    Raises:
        UsageError: There is no tokenizer, it is not a fast one, its vocabulary has no end-of-text token, or
            transformers makes a different tokenizer of the folder.
    """
    path = Path(source)
    if (path / "model" / "tokenizer.json").is_file():  # a run
        path /= "model"
    if path.is_file():
        whole = tokenizer_from_json(_read_bounded(path), str(path))
    elif (path / "tokenizer.json").is_file():
        whole = tokenizer_from_json(_read_bounded(path / "tokenizer.json"), str(path / "tokenizer.json"))
    elif (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
        whole = _gpt2_tokenizer(path)
    elif path.exists():
        raise UsageError(
            f"tokenizer {source}",
            expected="tokenizer.json, or vocab.json and merges.txt",
            found="neither in the folder",
            remedy="name a tokenizer folder or file, or leave the tokenizer out to train one",
        )
    else:
        whole = _hub_tokenizer(source)
    tokenizer = _text_tokenizer_of(whole, source)
    if (path / "tokenizer_config.json").is_file():
        _compare_with_transformers(path, tokenizer)
    return tokenizer


def as_text_tokenizer(source: AnyTokenizer) -> Tokenizer:
    """Return the text tokenizer of a tokenizer of transformers, of a folder, file or hub id, or itself.

    Raises:
        TypeError: It is neither a fast tokenizer nor a name.
        UsageError: See `load_text_tokenizer`.
    """
    if isinstance(source, Tokenizer):
        return source
    if isinstance(source, str | Path):
        return load_text_tokenizer(str(source))
    whole = getattr(source, "backend_tokenizer", None)
    if not isinstance(whole, Tokenizer):
        raise TypeError(f"a tokenizer is a fast one of transformers, a tokenizers.Tokenizer or a name, not {source!r}")
    return _text_tokenizer_of(whole, type(source).__name__)


def _read_bounded(path: Path) -> bytes:
    if path.stat().st_size > MAX_TOKENIZER_BYTES:
        found = f"{path.stat().st_size} bytes"
        raise UsageError(
            str(path),
            expected=f"a tokenizer of at most {MAX_TOKENIZER_BYTES} bytes",
            found=found,
            remedy="use another tokenizer",
        )
    return path.read_bytes()


def _text_tokenizer_of(whole: Tokenizer, name: str) -> Tokenizer:
    """Return a tokenizer without meta-token, padding, truncation and tokens added around a text."""
    tokenizer = _without_added_tokens(whole, {META_TOKEN, PAD_TOKEN})
    for token in (META_TOKEN, PAD_TOKEN):
        if tokenizer.token_to_id(token) is not None:
            raise UsageError(
                f"tokenizer {name}",
                expected=f"no {token} in the text vocabulary",
                found=f"id {tokenizer.token_to_id(token)}",
                remedy="use a tokenizer without it",
            )
    end_of_text_token(tokenizer)
    require_equal_ids(
        name, tokenizer, partial(plain_ids, whole), "in the text tokenizer made of it", content=whole.to_str()
    )
    return tokenizer


def tokenizer_from_json(content: bytes, name: str) -> Tokenizer:
    """Parse the bytes of a `tokenizer.json`.

    Raises:
        UsageError: The content is not a `tokenizer.json`; the message calls the file `name`.
    """
    try:
        return Tokenizer.from_str(content.decode())
    except Exception as error:
        # tokenizers raises plain Exception, with the parser's message
        raise UsageError(
            name, expected="a tokenizer.json of Hugging Face tokenizers", found=str(error), remedy="check the file"
        ) from error


def text_vocab_size(tokenizer: Tokenizer) -> int:
    """Return V, one more than the largest id; V is the id of the meta-token."""
    return 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())


class TextEncoder:
    """Bulk encoder of text that treats strings of special tokens as plain text.

    A text without such strings gets the same ids as from the tokenizer.

    Args:
        tokenizer: The text tokenizer, or what `as_text_tokenizer` makes one of.
        threads: Most threads of tiktoken; None means the cores that this process may use.

    Attributes:
        vocab_size: V, the text vocabulary with its end-of-text token.
        eos_token_id: The id that ends a document; text never encodes to it.
        sha256: Hex digest of `tokenizer.to_str()` in UTF-8, the canonical form that is stored beside shards.
        backend: Which library encodes.

    Raises:
        UsageError: The vocabulary has no end-of-text token, loses text (see `lost_bytes`), or encodes the string
            of a special token to the special id even as plain text; or the ids differ from the tokenizer's.
    """

    vocab_size: int
    eos_token_id: int
    sha256: str
    backend: Literal["tiktoken", "tokenizers"]

    def __init__(self, tokenizer: AnyTokenizer, *, threads: int | None = None) -> None:
        tokenizer = as_text_tokenizer(tokenizer)
        canonical = tokenizer.to_str()
        self.sha256 = hashlib.sha256(canonical.encode()).hexdigest()
        self.vocab_size = text_vocab_size(tokenizer)
        self.eos_token_id = tokenizer.get_vocab(with_added_tokens=True)[end_of_text_token(tokenizer)]
        self._threads = threads or (
            len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        )
        self._encoders = _checked_encoders(canonical, self.eos_token_id)
        self.backend = "tokenizers" if self._encoders.fast is None else "tiktoken"

    def encode_batch(self, texts: Sequence[str]) -> list[TokenIds]:
        """Return the ids of each text, without an end of text; each (length,) uint32 and read-only.

        tiktoken releases the interpreter lock, so threads encode documents on all cores that this process may use.
        The result does not depend on the number of cores.

        Raises:
            DataError: A text holds a lone surrogate, which UTF-8 cannot express, or a byte that the vocabulary lacks.
        """
        for text in texts:
            require_utf8(text)
            self._encoders.require_kept(text)
        if self.backend == "tokenizers":
            encodings = self._encoders.plain.encode_batch_fast(list(texts), add_special_tokens=False)
            return [_frozen(encoding.ids) for encoding in encodings]
        if self._threads == 1 or len(texts) < 2:
            return [self._encoders.encode(text) for text in texts]
        with ThreadPoolExecutor(self._threads) as pool:
            return list(pool.map(self._encoders.encode, texts))


class _Encoders(NamedTuple):
    """One tokenizer in two libraries, both blind to special tokens."""

    plain: Tokenizer
    fast: Callable[[str], TokenIds] | None
    """tiktoken's; None where it cannot give the same ids."""
    lost: frozenset[int]
    """Bytes that the vocabulary lacks."""

    def require_kept(self, text: str) -> None:
        """Refuse a text if the vocabulary would drop a part of it.

        Raises:
            DataError: It has such a byte.
        """
        if self.lost and (found := self.lost.intersection(text.encode())):
            character = next(character for character in text if found.intersection(character.encode()))
            raise DataError(
                "text",
                expected="bytes that the tokenizer's vocabulary has",
                found=f"{character!r}, whose byte {min(found):#04x} it would drop",
                remedy="take the character out of the text, or use a tokenizer with all bytes",
            )

    def encode(self, text: str) -> TokenIds:
        if self.fast is not None:
            # tiktoken's matcher fails on a very long run of space; `tokenizers` is slower, but encodes it
            with suppress(ValueError):
                return self.fast(text)
        return _frozen(self.plain.encode(text, add_special_tokens=False).ids)


@lru_cache(maxsize=8)
def _checked_encoders(canonical: str, eos_token_id: int) -> _Encoders:
    """Return the encoders of a tokenizer in its canonical form; made and checked once, since a run asks several times.

    Raises:
        UsageError: See `TextEncoder`.
    """
    specification: Specification = json.loads(canonical)
    encoders = _Encoders(_blind_to_special_tokens(specification, eos_token_id), None, lost_bytes(specification))
    fast = None if encoders.lost else tiktoken_encode(specification)  # tiktoken needs a token for every byte
    if fast is not None and np.array_equal(fast(PROBE_TEXT), encoders.encode(PROBE_TEXT)):
        encoders = encoders._replace(fast=fast)
    for token in specification["added_tokens"]:
        if token["special"] and token["id"] in encoders.encode(token["content"]):
            raise UsageError(
                "tokenizer",
                expected=f"plain text {token['content']} to encode to ordinary tokens",
                found=f"the special id {token['id']}",
                remedy="use a byte-level tokenizer",
            )
    tokenizer = Tokenizer.from_str(canonical)
    require_equal_ids(
        "tokenizer", tokenizer, lambda text: encoders.encode(text).tolist(), "in bulk encoding", content=canonical
    )
    return encoders


def build_hf_tokenizer(text_tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Return the model tokenizer: the text vocabulary, then `_PAUSE_` (id V), then `<|pad|>` (id V + 1).

    The model tokenizer encodes the string `_PAUSE_`, with the space before it, to the meta-token. `save_pretrained` and
    `AutoTokenizer` keep `meta_token` and `meta_token_id`. The argument is not changed.

    Raises:
        UsageError: Id V or V + 1 is taken, or the text tokenizer would give other ids for the same text.
    """
    from transformers import PreTrainedTokenizerFast

    meta_token = AddedToken(META_TOKEN, lstrip=True, normalized=False, special=True)
    tokenizer = Tokenizer.from_str(text_tokenizer.to_str())
    num_text = text_vocab_size(tokenizer)
    end_of_text = end_of_text_token(tokenizer)
    tokenizer.add_special_tokens([meta_token])
    tokenizer.add_special_tokens([AddedToken(PAD_TOKEN, normalized=False, special=True)])
    if (tokenizer.token_to_id(META_TOKEN), tokenizer.token_to_id(PAD_TOKEN)) != (num_text, num_text + 1):
        raise UsageError(
            "tokenizer",
            expected=f"ids {num_text} and {num_text + 1} free for {META_TOKEN} and {PAD_TOKEN}",
            found=f"{tokenizer.token_to_id(META_TOKEN)} and {tokenizer.token_to_id(PAD_TOKEN)}",
            remedy="load it with load_text_tokenizer",
        )
    model_tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=end_of_text,
        eos_token=end_of_text,
        pad_token=PAD_TOKEN,
        extra_special_tokens={"meta_token": meta_token},
        clean_up_tokenization_spaces=False,
    )
    encode = partial(model_tokenizer.encode, add_special_tokens=False, verbose=False)
    require_equal_ids("tokenizer", text_tokenizer, encode, "in the model tokenizer", content=tokenizer.to_str())
    return model_tokenizer


def prefix_ids(tokenizer: Any) -> tuple[int, ...]:
    """Return the ids that a tokenizer of transformers puts before a text, such as a beginning-of-text token."""
    if not hasattr(tokenizer, "backend_tokenizer"):
        return ()
    probe = "a"
    whole = list(tokenizer(probe).input_ids)
    bare = list(tokenizer(probe, add_special_tokens=False).input_ids)
    return tuple(whole[: whole.index(bare[0])]) if bare and bare[0] in whole else ()


def ends_clause_table(tokenizer: Tokenizer) -> npt.NDArray[np.bool_]:
    """Return (V,) bool: True for tokens whose text ends in one of . , ; : ! ? or holds a line end.

    Space around the text is ignored.
    """
    table = np.zeros(text_vocab_size(tokenizer), dtype=np.bool_)
    ids = sorted(set(tokenizer.get_vocab(with_added_tokens=True).values()))
    for token_id, text in zip(ids, tokenizer.decode_batch([[i] for i in ids], skip_special_tokens=False), strict=True):
        table[token_id] = "\n" in text or text.strip().endswith(_CLAUSE_ENDS)
    return table


def _with_short_pieces(texts: Iterable[str]) -> Iterator[str]:
    """Yield the texts, cut inside any piece so long that the training would hardly end."""
    for text in texts:
        start = 0
        for piece in _LONG_PIECE.finditer(text):
            yield text[start : piece.end()]
            start = piece.end()
        yield text[start:]


def _byte_level(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _gpt2_tokenizer(folder: Path) -> Tokenizer:
    try:
        model = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    except Exception as error:
        # tokenizers raises plain Exception, with the parser's message
        raise UsageError(
            str(folder), expected="GPT-2's vocab.json and merges.txt", found=str(error), remedy="check the files"
        ) from error
    tokenizer = _byte_level(model)
    if tokenizer.token_to_id(END_OF_TEXT) is not None:
        tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, normalized=False, special=True)])
    return tokenizer


def _hub_tokenizer(source: str) -> Tokenizer:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        backend = getattr(tokenizer, "backend_tokenizer", None)
    except (OSError, ValueError, ImportError) as error:
        found = f"neither ({type(error).__name__})"
        backend = None
    else:
        found = "a tokenizer without a fast version"
    if not isinstance(backend, Tokenizer):
        raise UsageError(
            f"tokenizer {source}",
            expected="a file, a folder, or an id that the Hugging Face hub or its cache has",
            found=found,
            remedy="check the spelling and the connection",
        )
    return backend


def _without_added_tokens(tokenizer: Tokenizer, contents: set[str]) -> Tokenizer:
    specification: Specification = json.loads(tokenizer.to_str())
    specification["added_tokens"] = [t for t in specification["added_tokens"] if t["content"] not in contents]
    bare = Tokenizer.from_str(json.dumps(specification | {"post_processor": None, "padding": None, "truncation": None}))
    # the library renumbers added tokens, so one after a gap would silently get another id
    before = tokenizer.get_vocab(with_added_tokens=True)
    for token, token_id in bare.get_vocab(with_added_tokens=True).items():
        if before[token] != token_id:
            raise UsageError(
                "tokenizer",
                expected=f"{' and '.join(sorted(contents))} after the text vocabulary",
                found=f"{token!r} with id {before[token]}, which would become {token_id}",
                remedy="use a tokenizer without them",
            )
    return bare


def _blind_to_special_tokens(specification: Specification, eos_token_id: int) -> Tokenizer:
    """Return a tokenizer that encodes the strings of special tokens and of the end of text as plain text."""
    added = [
        token | {"special": token["special"] or token["id"] == eos_token_id} for token in specification["added_tokens"]
    ]
    tokenizer = Tokenizer.from_str(json.dumps(specification | {"added_tokens": added, "post_processor": None}))
    tokenizer.encode_special_tokens = True
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _compare_with_transformers(folder: Path, tokenizer: Tokenizer) -> None:
    """Refuse a folder that transformers reads differently: it may build the tokenizer by the name of its class."""

    def encode(text: str) -> list[int]:
        from transformers import AutoTokenizer

        try:
            other = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError, ImportError):
            return plain_ids(
                tokenizer, text
            )  # transformers cannot load the folder, so there is nothing to compare with
        ids: list[int] = other.encode(text, add_special_tokens=False, verbose=False)
        return ids

    files = sorted(path for path in folder.iterdir() if path.suffix in {".json", ".txt", ".model"})
    content = repr([(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files])
    remedy = "set tokenizer_class to PreTrainedTokenizerFast there, or name the file tokenizer.json itself"
    require_equal_ids(str(folder), tokenizer, encode, "in transformers' AutoTokenizer", content=content, remedy=remedy)


def _frozen(ids: list[int]) -> TokenIds:
    array = np.array(ids, dtype=np.uint32)
    array.flags.writeable = False
    return array


def require_utf8(text: str) -> None:
    """Refuse a text with a lone surrogate.

    Raises:
        DataError: It has one.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            "text",
            expected="characters that UTF-8 can express",
            found=f"a lone surrogate at character {error.start}",
            remedy="replace it before encoding",
        ) from error
