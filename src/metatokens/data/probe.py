"""A text on which tokenizers that should be equal must agree, and the comparison."""

import hashlib
from collections.abc import Callable

from tokenizers import Tokenizer

from metatokens.data.special_tokens import META_TOKEN, PAD_TOKEN, end_of_text_token
from metatokens.errors import UsageError

# contractions, digits, runs of space, line ends,
# scripts with and without case, combining marks, emoji sequences, symbols, rare spaces, code, special-token strings
PROBE_TEXT = (
    "The quick brown fox's tail isn't 12.5% of what they'd've said; we'll see, I'M SURE!  Two  spaces,\ttabs\t\t,\n\n\n"
    " trailing \r\n mixed \n \t end   \u00a0\u2003\u3000x\u200b\u200dy\ufeff na\u00efve caf\u00e9 cafe\u0301 "
    "Stra\u00dfe \u0130stanbul \u03a3\u03af\u03c3\u03c5\u03c6\u03bf\u03c2 \u043f\u0440\u0438\u0432\u0435\u0442 "
    "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627 \u0939\u093f\u0928\u094d\u0926\u0940 \u0e44\u0e17\u0e22 "
    "\u6f22\u5b57\u304b\u306a\u30ab\u30ca \ud55c\uad6d\uc5b4 \U0001f468\u200d\U0001f469\u200d\U0001f467 "
    "\U0001f1eb\U0001f1f7 \u00bd\u00b2\u2075 \u0661\u0662\u0663 \u2163 \U0001d400\U0001d7d9 \u20ac\u00a3\u00a5 "
    "\u2014\u2026 \u201cquoted\u201d def f(x_1: int) -> str:\n    return x_1**2  # 0xFFEE 1e-5 a.b@c.org https://d.org/?q=1&r=%20\n"
    "aaaaaaaaaaaaaaaaaaaaaaaa .......... ======== <|endoftext|> _PAUSE_ <|pad|> \x00\x01\x7f\u0085 end "
)

_agreed: set[bytes] = set()
"""Digests of the pairs that were compared in this process. They need no other look, which also leaves memory behind:
tokenizers does not free all of what a tokenizer takes when it encodes."""


def require_equal_ids(
    name: str,
    tokenizer: Tokenizer,
    encode: Callable[[str], list[int]],
    where: str,
    *,
    content: str,
    remedy: str = "use another tokenizer",
) -> None:
    """Compare a tokenizer's ids of its probe text with those of another that should be equal.

    Args:
        name: of the tokenizer, for messages.
        tokenizer: gives the expected ids.
        encode: gives the ids of the other.
        where: what the other is.
        content: of the other; the same two are compared once.
        remedy: what to do if they differ.

    Raises:
        UsageError: They differ.
    """
    pair = hashlib.sha256(repr((where, content, tokenizer.to_str())).encode()).digest()
    if pair in _agreed:
        return
    text = probe_text(tokenizer)
    expected, found = plain_ids(tokenizer, text), encode(text)
    if found != expected:
        first = next((i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), len(found))
        raise UsageError(
            name if name == "tokenizer" else f"tokenizer {name}",
            expected=f"the same ids of a probe text {where} ({len(expected)} ids)",
            found=f"{len(found)} ids, another from id {first} on ({tokenizer.decode(expected[first : first + 4])!r})",
            remedy=remedy,
        )
    _agreed.add(pair)


def plain_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids of a text, without padding, truncation or added tokens."""
    if tokenizer.padding or tokenizer.truncation:
        tokenizer = Tokenizer.from_str(tokenizer.to_str())  # a copy, which may be changed
        tokenizer.no_padding()
        tokenizer.no_truncation()
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def probe_text(tokenizer: Tokenizer) -> str:
    """Return a probe text that holds every ordinary added token and no special one."""
    added = tokenizer.get_added_tokens_decoder().values()
    text = PROBE_TEXT + " ".join(token.content for token in added)
    special = {token.content for token in added if token.special} | {
        META_TOKEN,
        PAD_TOKEN,
        end_of_text_token(tokenizer),
    }
    for content in sorted(special, key=len, reverse=True):
        text = text.replace(content, "")
    return text
