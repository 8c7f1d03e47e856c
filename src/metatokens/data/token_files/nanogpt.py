"""nanoGPT's token files: raw ids and nothing else (karpathy/nanoGPT@master:data/openwebtext/prepare.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from metatokens.data.token_files.base import TokenFile

if TYPE_CHECKING:
    from pathlib import Path


def read_nanogpt(path: Path) -> TokenFile | None:
    """Read `NAME.bin`: the format does not say the type of the ids, and a document ends after each end of text."""
    return TokenFile(path, dtype=None, ends=None) if path.suffix == ".bin" else None
