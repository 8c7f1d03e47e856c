"""A model of two tiny layers with an optimizer that has taken steps, and its tokenizer; made anew for each test."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from metatokens.config.schema import ModelConfig, OptimizerConfig
from metatokens.data.tokenizer import build_hf_tokenizer, train_tokenizer
from metatokens.model import MetaTokenForCausalLM
from metatokens.training.checkpoint import TrainingState
from metatokens.training.initialization import build_model
from metatokens.training.optimizer import build_optimizer
from metatokens.training.saving import save_checkpoint

TEXT_VOCAB_SIZE = 300


@dataclass
class Training:
    model: MetaTokenForCausalLM
    optimizer: torch.optim.Optimizer
    tokenizer: Any

    def take_step(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, TEXT_VOCAB_SIZE + 1, (2, 16), generator=generator)
        self.model(input_ids=ids, labels=ids).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save(self, folder: Path, step: int, *, keep: int = 2) -> Path:
        state = TrainingState(step, "the content", 1)
        return save_checkpoint(folder, self.model, self.optimizer, state, tokenizer=self.tokenizer, keep=keep)


@pytest.fixture(scope="session")
def hf_tokenizer() -> Any:
    return build_hf_tokenizer(train_tokenizer(["one two three four five six"] * 5, TEXT_VOCAB_SIZE))


@pytest.fixture(scope="session")
def make_training(hf_tokenizer: Any) -> Callable[..., Training]:
    def make(**changes: Any) -> Training:
        fields = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32}
        config = ModelConfig(**{**fields, **changes})
        model = build_model(config, text_vocab_size=TEXT_VOCAB_SIZE, eos_token_id=0, seed=0)
        return Training(model, build_optimizer(model, OptimizerConfig(learning_rate=1e-2)), hf_tokenizer)

    return make


@pytest.fixture
def training(make_training: Callable[..., Training]) -> Training:
    training = make_training()
    training.take_step(0)
    return training
