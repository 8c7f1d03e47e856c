"""From new tokens to text, as soon as its characters are complete."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from metatokens.data.special_tokens import META_TOKEN
from metatokens.model.compatibility import BaseStreamer

if TYPE_CHECKING:
    from collections.abc import Callable

    from tokenizers import Tokenizer
    from torch import Tensor

_INCOMPLETE = "\ufffd"  # what the bytes of a character that is not finished decode to


@dataclass(frozen=True)
class GeneratedText:
    """A continuation and its cost."""

    text: str
    """What follows the prompt, without the end of text; with `show_meta`, every generated meta-token as `_PAUSE_`."""
    text_tokens: int
    """Generated text tokens, without the end of text."""
    meta_tokens: int
    """Generated meta-tokens; those of the prompt do not count."""
    seconds: float
    """From the prompt's tokens to the last new one."""
    stopped_by: Literal["length", "end_of_text"]


class TextWriter(BaseStreamer):
    """Turns generated ids into pieces of text; a piece ends with a complete character."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: list[int],
        eos_token_id: int,
        meta_token_id: int | None,
        stream: Callable[[str], None] | None,
        show_meta: bool,
    ) -> None:
        """Start behind a prompt, whose text is not written."""
        self.pieces: list[str] = []
        self.num_text = 0
        self.num_meta = 0
        self.has_ended = False
        self._tokenizer = tokenizer
        self._eos_token_id = eos_token_id
        self._meta_token_id = meta_token_id
        self._stream = stream
        self._show_meta = show_meta
        self._is_prompt = True
        # ids from `_context` on are decoded again, and those before `_written` have been shown. The context matters: a
        # tokenizer that drops the space at the start of a text keeps it after other ids, such as the prompt's
        self._text_ids = [*prompt_ids]
        self._context, self._written = 0, len(prompt_ids)

    def put(self, value: Tensor) -> None:
        """Take new ids; the first call brings the prompt."""
        if self._is_prompt:
            self._is_prompt = False
            return
        for token in value.flatten().tolist():
            self.write(token)

    def write(self, token: int) -> None:
        """Take a new token."""
        if token == self._eos_token_id:
            self.has_ended = True
        elif token == self._meta_token_id:
            self.num_meta += 1
            if self._show_meta:
                self._write(META_TOKEN)
        else:
            self.num_text += 1
            self._text_ids.append(token)
            self._write_new_text()

    def end(self) -> None:
        """Write the rest, even if its last character is incomplete."""
        self._write_new_text(is_last=True)

    def result(self, seconds: float) -> GeneratedText:
        """Return what was written, with the time that it took."""
        return GeneratedText(
            text="".join(self.pieces),
            text_tokens=self.num_text,
            meta_tokens=self.num_meta,
            seconds=seconds,
            stopped_by="end_of_text" if self.has_ended else "length",
        )

    def _write_new_text(self, is_last: bool = False) -> None:
        shown = self._decode(self._text_ids[self._context : self._written])
        text = self._decode(self._text_ids[self._context :])
        if len(text) > len(shown) and (is_last or not text.endswith(_INCOMPLETE)):
            self._context, self._written = self._written, len(self._text_ids)
            self._write(text[len(shown) :])

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text

    def _write(self, piece: str) -> None:
        self.pieces.append(piece)
        if self._stream is not None:
            self._stream(piece)
