"""Readers of the token files that other packages write: one function in one file for each format.

A reader takes a path. It returns None if the file is not of its format, and otherwise what the format says about the
tokens. A new one is added to `READERS`, which are asked in this order.
"""

from metatokens.data.token_files.base import TokenFile as TokenFile
from metatokens.data.token_files.datatrove import read_datatrove
from metatokens.data.token_files.llm_c import read_llm_c
from metatokens.data.token_files.megatron import read_megatron
from metatokens.data.token_files.nanogpt import read_nanogpt

READERS = {
    "datatrove": read_datatrove,
    "Megatron": read_megatron,
    "llm.c": read_llm_c,
    "nanoGPT": read_nanogpt,
}
"""The reader of each format, by the name of the package that writes it."""
