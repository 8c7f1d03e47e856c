"""A tiny decoder of transformers with a byte tokenizer, books and bAbI stories, for tests of long contexts."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from metatokens.data.tokenizer import train_tokenizer
from tiny_models import randomize

STORY = """1 Mary moved to the bathroom.
2 John went to the hallway.
3 Where is Mary? \tbathroom\t1
4 Daniel went back to the garden.
5 Where is John? \thallway\t2
1 Sandra took the football there.
2 Where is Sandra?|office|1
"""


@cache
def byte_tokenizer() -> Tokenizer:
    return train_tokenizer([], 257)


@cache
def decoder(positions: int = 2048) -> Any:
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
    )
    torch.manual_seed(0)
    return randomize(LlamaForCausalLM(config)).eval()


def write_model(folder: Path) -> Path:
    """Write the decoder and its tokenizer, and return the folder."""
    decoder().save_pretrained(folder)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def write_books(folder: Path, count: int = 8) -> Path:
    """Write books with the licence of Project Gutenberg around each."""
    folder.mkdir()
    for book in range(count):
        lines = " ".join(f"In book {book} the line {line} says nothing of use." for line in range(200))
        text = f"Produced by nobody.\n*** START OF THIS BOOK ***\n{lines}\n*** END OF THIS BOOK ***\nLicence."
        (folder / f"{book}.txt").write_text(text)
    return folder


def write_stories(folder: Path) -> Path:
    """Write the five tasks of bAbI that BABILong takes, all with one story."""
    folder.mkdir()
    for number in range(1, 6):
        (folder / f"qa{number}_a-name_test.txt").write_text(STORY)
    return folder
