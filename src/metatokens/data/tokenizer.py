"""Text to tokens and back: training, loading, bulk encoding, and the tokenizer that ships with a model.

Two tokenizers share one vocabulary. The *text tokenizer* (`tokenizers.Tokenizer`) knows no meta-token; text is
encoded with it, and with its special tokens taken out, so no text can smuggle in a meta-token or an end of
document. The *model tokenizer* (`PreTrainedTokenizerFast`) adds the meta-token and padding behind the text
vocabulary, for prompts. Ids: text 0 .. V - 1, meta-token V, padding V + 1.

Bulk encoding goes through tiktoken where the vocabulary is a byte-level BPE like GPT-2's: the same ids, several
times faster. tiktoken is handed the merged tokens ranked by id, so a vocabulary whose ids do not follow the
order of its merges, or that disagrees on a probe text, stays with `tokenizers`.
"""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from metatokens.errors import DataError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from transformers import PreTrainedTokenizerFast

META_TOKEN = "_PAUSE_"  # paper section 3: the designated meta-token of the tasks
END_OF_TEXT = "<|endoftext|>"
PAD_TOKEN = "<|pad|>"
# what ends a document, by the first of these that a vocabulary has
_END_TOKENS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")

_CLAUSE_ENDS = tuple(".,;:!?")

# GPT-2's split pattern as tiktoken states it (openai/tiktoken@main:tiktoken_ext/openai_public.py, MIT)
_GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""

# ids of both encoders must agree on this before tiktoken is used: contractions, digits, runs of space, line ends,
# scripts with and without case, combining marks, emoji sequences, symbols, rare spaces, code, special-token strings
_PROBE_TEXT = (
    "The quick brown fox's tail isn't 12.5% of what they'd've said; we'll see, I'M SURE!  Two  spaces,\ttabs\t\t,\n\n\n"
    " trailing \r\n mixed \n \t end   \u00a0\u2003\u3000x\u200b\u200dy\ufeff na\u00efve caf\u00e9 cafe\u0301 "
    "Stra\u00dfe \u0130stanbul \u03a3\u03af\u03c3\u03c5\u03c6\u03bf\u03c2 \u043f\u0440\u0438\u0432\u0435\u0442 "
    "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627 \u0939\u093f\u0928\u094d\u0926\u0940 \u0e44\u0e17\u0e22 "
    "\u6f22\u5b57\u304b\u306a\u30ab\u30ca \ud55c\uad6d\uc5b4 \U0001f468\u200d\U0001f469\u200d\U0001f467 "
    "\U0001f1eb\U0001f1f7 \u00bd\u00b2\u2075 \u0661\u0662\u0663 \u2163 \U0001d400\U0001d7d9 \u20ac\u00a3\u00a5 "
    "\u2014\u2026 \u201cquoted\u201d def f(x_1: int) -> str:\n    return x_1**2  # 0xFFEE 1e-5 a.b@c.org https://d.org/?q=1&r=%20\n"
    "aaaaaaaaaaaaaaaaaaaaaaaa .......... ======== <|endoftext|> _PAUSE_ <|pad|> \x00\x01\x7f\u0085 end "
)

TokenIds: TypeAlias = npt.NDArray[np.uint32]
_Specification: TypeAlias = dict[str, Any]


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE with GPT-2's split pattern; equal texts in equal order give equal merges.

    `<|endoftext|>` has id 0, the 256 bytes follow, then the merges. The result is smaller than `vocab_size`
    where the texts hold too few pairs.

    Raises:
        UsageError: `vocab_size` has no room for the bytes and the end of text.
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
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_text_tokenizer(source: str) -> Tokenizer:
    """Load a text tokenizer: no meta-token, no padding, no truncation, nothing put around a text.

    The folder of a trained model gives back the text tokenizer that it was made from, to the byte.

    Args:
        source: A folder with `tokenizer.json`, a folder with GPT-2's `vocab.json` and `merges.txt`, a
            `tokenizer.json` file, or the id of a tokenizer on the Hugging Face hub.

    Raises:
        UsageError: Nothing there, not a fast tokenizer, or no end-of-text token in the vocabulary.
    """
    path = Path(source)
    if path.is_file():
        tokenizer = tokenizer_from_json(path.read_bytes(), str(path))
    elif (path / "tokenizer.json").is_file():
        tokenizer = tokenizer_from_json((path / "tokenizer.json").read_bytes(), str(path / "tokenizer.json"))
    elif (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
        tokenizer = _gpt2_tokenizer(path)
    elif path.exists():
        raise UsageError(
            f"tokenizer {source}",
            expected="tokenizer.json, or vocab.json and merges.txt",
            found="neither in the folder",
            remedy="name a tokenizer folder or file, or leave the tokenizer out to train one",
        )
    else:
        tokenizer = _hub_tokenizer(source)
    tokenizer = _without_added_tokens(tokenizer, {META_TOKEN, PAD_TOKEN})
    for token in (META_TOKEN, PAD_TOKEN):
        if tokenizer.token_to_id(token) is not None:
            raise UsageError(
                f"tokenizer {source}",
                expected=f"no {token} in the text vocabulary",
                found=f"id {tokenizer.token_to_id(token)}",
                remedy="use a tokenizer without it",
            )
    end_of_text_token(tokenizer)
    return tokenizer


def tokenizer_from_json(content: bytes, name: str) -> Tokenizer:
    """Parse the bytes of a `tokenizer.json`.

    Raises:
        UsageError: Not such a file; the message calls it `name`.
    """
    try:
        return Tokenizer.from_str(content.decode())
    except Exception as error:
        # tokenizers raises plain Exception, with the parser's message
        raise UsageError(
            name, expected="a tokenizer.json of Hugging Face tokenizers", found=str(error), remedy="check the file"
        ) from error


def end_of_text_token(tokenizer: Tokenizer) -> str:
    """Return the token that ends a document: `<|endoftext|>`, or what the vocabulary has in its place.

    Raises:
        UsageError: None of the known ones is in the vocabulary.
    """
    for token in _END_TOKENS:
        if tokenizer.token_to_id(token) is not None:
            return token
    raise UsageError(
        "tokenizer",
        expected=f"one of {', '.join(_END_TOKENS)} in the vocabulary",
        found="none",
        remedy="use a tokenizer with an end-of-text token",
    )


def text_vocab_size(tokenizer: Tokenizer) -> int:
    """Return V, one more than the largest id; V is the id of the meta-token."""
    return 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())


class TextEncoder:
    """Bulk encoder of text; strings that look like special tokens stay plain text.

    Attributes:
        vocab_size: V, the text vocabulary with its end-of-text token.
        eos_token_id: The id that ends a document; text never encodes to it.
        sha256: Hex digest of `tokenizer.to_str()` in UTF-8, the canonical form that is stored beside shards.
        backend: Which library encodes.

    Raises:
        UsageError: No end-of-text token, a byte-level BPE without some byte, or a vocabulary that spells a
            special token with its own id even in plain text.
    """

    vocab_size: int
    eos_token_id: int
    sha256: str
    backend: Literal["tiktoken", "tokenizers"]

    def __init__(self, tokenizer: Tokenizer) -> None:
        canonical = tokenizer.to_str()
        specification: _Specification = json.loads(canonical)
        self.sha256 = hashlib.sha256(canonical.encode()).hexdigest()
        self.vocab_size = text_vocab_size(tokenizer)
        self.eos_token_id = tokenizer.get_vocab(with_added_tokens=True)[end_of_text_token(tokenizer)]
        self._plain = Tokenizer.from_str(json.dumps(specification | {"added_tokens": [], "post_processor": None}))
        self._plain.no_padding()
        self._plain.no_truncation()
        self._threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        encode = _tiktoken_encode(specification)
        if encode is not None and np.array_equal(encode(_PROBE_TEXT), self._plain_encode(_PROBE_TEXT)):
            self.backend, self._encode = "tiktoken", encode
        else:
            self.backend, self._encode = "tokenizers", self._plain_encode
        self._check_special_tokens(specification)

    def encode_batch(self, texts: Sequence[str]) -> list[TokenIds]:
        """Return the ids of each text, without an end of text; each (length,) uint32 and read-only.

        tiktoken releases the interpreter lock, so documents are spread over the cores that this process may use;
        the result does not depend on their number.

        Raises:
            DataError: A text holds a lone surrogate, which UTF-8 cannot express.
        """
        for text in texts:
            _require_utf8(text)
        if self.backend == "tokenizers":
            encodings = self._plain.encode_batch_fast(list(texts), add_special_tokens=False)
            return [_frozen(encoding.ids) for encoding in encodings]
        if self._threads == 1 or len(texts) < 2:
            return [self._encode(text) for text in texts]
        with ThreadPoolExecutor(self._threads) as pool:
            return list(pool.map(self._encode, texts))

    def _plain_encode(self, text: str) -> TokenIds:
        return _frozen(self._plain.encode(text, add_special_tokens=False).ids)

    def _check_special_tokens(self, specification: _Specification) -> None:
        for token in specification["added_tokens"]:
            if token["special"] and token["id"] in self._encode(token["content"]):
                raise UsageError(
                    "tokenizer",
                    expected=f"plain text {token['content']} to encode to ordinary tokens",
                    found=f"the special id {token['id']}",
                    remedy="use a byte-level tokenizer",
                )


def build_hf_tokenizer(text_tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Return the model tokenizer: the text vocabulary, then `_PAUSE_` (id V), then `<|pad|>` (id V + 1).

    Here the string `_PAUSE_` is the meta-token, and swallows the space before it. `save_pretrained` and
    `AutoTokenizer` keep `meta_token` and `meta_token_id`. The argument is not changed.
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
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=end_of_text,
        eos_token=end_of_text,
        pad_token=PAD_TOKEN,
        extra_special_tokens={"meta_token": meta_token},
        clean_up_tokenization_spaces=False,
    )


def ends_clause_table(tokenizer: Tokenizer) -> npt.NDArray[np.bool_]:
    """Return (V,) bool: the tokens whose text ends in one of . , ; : ! ? or holds a line end.

    Space around the text does not count.
    """
    table = np.zeros(text_vocab_size(tokenizer), dtype=np.bool_)
    ids = sorted(set(tokenizer.get_vocab(with_added_tokens=True).values()))
    for token_id, text in zip(ids, tokenizer.decode_batch([[i] for i in ids], skip_special_tokens=False), strict=True):
        table[token_id] = "\n" in text or text.strip().endswith(_CLAUSE_ENDS)
    return table


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
        backend = getattr(AutoTokenizer.from_pretrained(source), "backend_tokenizer", None)
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
    specification: _Specification = json.loads(tokenizer.to_str())
    specification["added_tokens"] = [t for t in specification["added_tokens"] if t["content"] not in contents]
    return Tokenizer.from_str(json.dumps(specification | {"post_processor": None, "padding": None, "truncation": None}))


def _tiktoken_encode(specification: _Specification) -> Callable[[str], TokenIds] | None:
    """Return tiktoken's encoder of the same vocabulary, or None where it is no byte-level BPE like GPT-2's."""
    import tiktoken

    model, split = specification["model"], specification["pre_tokenizer"] or {}
    is_gpt2_like = (
        model["type"] == "BPE"
        and not any(
            model.get(key)
            for key in (
                "dropout",
                "unk_token",
                "continuing_subword_prefix",
                "end_of_word_suffix",
                "byte_fallback",
                "ignore_merges",
            )
        )
        and specification["normalizer"] is None
        and split.get("type") == "ByteLevel"
        and not split["add_prefix_space"]
        and split.get("use_regex", True)
    )
    if not is_gpt2_like:
        return None
    vocabulary = model["vocab"]
    byte_of = _byte_alphabet()
    missing = [byte for char, byte in byte_of.items() if char not in vocabulary]
    if missing:
        raise UsageError(
            "tokenizer",
            expected="a byte-level vocabulary with all 256 bytes",
            found=f"{len(missing)} missing, the first {missing[0]:#04x}",
            remedy="train it with the full byte alphabet",
        )
    merged = [left + right for left, right in model["merges"]]
    ids = [vocabulary[token] for token in merged]
    if any(a >= b for a, b in pairwise(ids)):
        return None
    ranks = {bytes(byte_of[char] for char in token): vocabulary[token] for token in [*byte_of, *merged]}
    encoding = tiktoken.Encoding("text", pat_str=_GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={})

    def encode(text: str) -> TokenIds:
        return encoding.encode_to_numpy(text, disallowed_special=())

    return encode


def _byte_alphabet() -> dict[str, int]:
    """Return the byte behind each character of GPT-2's byte-level alphabet.

    Printable Latin-1 bytes stand for themselves; the others, in order, for the characters from U+0100 on
    (openai/gpt-2@master:src/encoder.py, bytes_to_unicode, MIT).
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def _frozen(ids: list[int]) -> TokenIds:
    array = np.array(ids, dtype=np.uint32)
    array.flags.writeable = False
    return array


def _require_utf8(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            "text",
            expected="characters that UTF-8 can express",
            found=f"a lone surrogate at character {error.start}",
            remedy="replace it before encoding",
        ) from error
