"""The contenders of a training step: one function each, which builds a model and says what goes into it.

All have the same width, depth, heads and vocabulary, no dropout, and predict the same tokens. Those in the layout of
`meta` have as many positions; `plain_text` and `x_memory` have the text tokens alone.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from metatokens.bench.measuring import Registry
from metatokens.bench.sequences import Sequences
from metatokens.config.bench import ModelBench
from metatokens.config.schema import ModelConfig
from metatokens.model import MetaTokenConfig, MetaTokenForCausalLM
from metatokens.model.loss import targets_of_labels
from metatokens.model.outputs import MetaTokenCausalLMOutput, MetaTokenModelOutput
from metatokens.model.reference import DenseReferenceBlock, DenseReferenceForCausalLM, DenseReferenceModel
from metatokens.training.initialization import build_model

TRAINING = Registry()
EVERY = 9
"""Text tokens between two memory tokens of x-transformers, which is a ratio of 0.1."""


class Candidate(NamedTuple):
    """A model and its inputs."""

    model: nn.Module
    """Called with `inputs`, it returns an output with `loss`."""
    decoder: nn.Module
    """The model without its head; called with `decoder_inputs`, it returns an output with `last_hidden_state`."""
    inputs: Mapping[str, Any]
    decoder_inputs: Mapping[str, Any]
    config: MetaTokenConfig
    """Of our model that does the same work, from which operations are counted."""
    num_positions: int
    """Of a row."""
    num_meta: int = 0
    """Meta-tokens of a row that take part in meta-attention."""


class Shape(NamedTuple):
    """What the contenders have in common."""

    settings: ModelBench
    length: int
    """T: positions that a model must hold."""

    @property
    def meta_token_id(self) -> int:
        """The first id after the text's."""
        return self.settings.vocabulary

    def config(self, **changes: Any) -> ModelConfig:
        """Return the shape as a config of this package; learned positions, as GPT-2's."""
        return ModelConfig(
            **{
                "hidden_size": self.settings.hidden_size,
                "num_hidden_layers": self.settings.num_hidden_layers,
                "num_attention_heads": self.settings.num_attention_heads,
                "max_position_embeddings": self.length,
                "position_encoding": "learned",
                **changes,
            }
        )

    def hf_config(self, **changes: Any) -> MetaTokenConfig:
        """Return it as a config of transformers."""
        vocabulary = self.settings.vocabulary
        return MetaTokenConfig(**self.config(**changes).to_hf(vocabulary, eos_token_id=vocabulary - 1))

    def build(self, **changes: Any) -> MetaTokenForCausalLM:
        """Build the model; weights depend on the names of modules alone, so contenders share them."""
        vocabulary = self.settings.vocabulary
        return build_model(self.config(**changes), text_vocab_size=vocabulary, eos_token_id=vocabulary - 1, seed=0)


def as_candidate(model: Any, decoder: nn.Module, config: MetaTokenConfig, inputs: Mapping[str, Any]) -> Candidate:
    """Return the candidate of a model whose decoder takes the inputs without what makes the loss."""
    of_loss = ("labels", "shift_labels")
    decoder_inputs = {name: value for name, value in inputs.items() if name not in of_loss}
    return Candidate(model, decoder, inputs, decoder_inputs, config, inputs["input_ids"].shape[1])


@TRAINING.add()
def plain(shape: Shape, sequences: Sequences) -> Candidate:
    """No meta-tokens and no meta-attention, at as many positions."""
    return _ours(shape.build(meta_attention_layers="none"), sequences.filled_ids, sequences.labels)


@TRAINING.add()
def plain_text(shape: Shape, sequences: Sequences) -> Candidate:
    """No meta-tokens and no meta-attention: the same text alone."""
    return _ours(shape.build(meta_attention_layers="none"), sequences.text_ids, sequences.text_labels)


@TRAINING.add()
def plain_rope(shape: Shape, sequences: Sequences) -> Candidate:
    """As `plain`, with rotary positions."""
    model = shape.build(meta_attention_layers="none", position_encoding="rope")
    return _ours(model, sequences.filled_ids, sequences.labels)


@TRAINING.add()
def pause(shape: Shape, sequences: Sequences) -> Candidate:
    """Meta-tokens without meta-attention, as pause tokens."""
    return _ours(shape.build(meta_attention_layers="none"), sequences.ids, sequences.labels)


@TRAINING.add()
def meta(shape: Shape, sequences: Sequences) -> Candidate:
    """Packed meta-attention, from ids and labels alone."""
    return _ours(shape.build(), sequences.ids, sequences.labels)._replace(num_meta=sequences.meta_indices.shape[1])


@TRAINING.add()
def meta_indices(shape: Shape, sequences: Sequences) -> Candidate:
    """Packed meta-attention, told by the collator where the meta-tokens stand and what is predicted."""
    model = shape.build()
    inputs = {
        "input_ids": sequences.ids,
        "shift_labels": sequences.targets,
        "meta_indices": sequences.meta_indices,
        "use_cache": False,
    }
    found = as_candidate(model, model.model, model.config, inputs)
    return found._replace(num_meta=sequences.meta_indices.shape[1])


@TRAINING.add()
def dense(shape: Shape, sequences: Sequences) -> Candidate:
    """The paper's dense form of meta-attention, as the reference writes it."""
    return _dense(DenseReferenceForCausalLM, shape, sequences)


@TRAINING.add()
def dense_fused(shape: Shape, sequences: Sequences) -> Candidate:
    """The dense form with its mask in the fused kernel."""
    return _dense(DenseFusedForCausalLM, shape, sequences)


@TRAINING.add()
def gpt2(shape: Shape, sequences: Sequences) -> Candidate:
    """GPT-2 of transformers."""
    config = shape.hf_config(meta_attention_layers="none")
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            bos_token_id=None,
            eos_token_id=None,
            vocab_size=config.vocab_size,
            n_positions=shape.length,
            n_embd=config.hidden_size,
            n_layer=config.num_hidden_layers,
            n_head=config.num_attention_heads,
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        )
    )
    inputs = {"input_ids": sequences.filled_ids, "labels": sequences.labels, "use_cache": False}
    return as_candidate(model, model.transformer, config, inputs)


@TRAINING.add()
def llama(shape: Shape, sequences: Sequences) -> Candidate:
    """Llama of transformers, with an MLP of as many weights."""
    config = shape.hf_config(meta_attention_layers="none", position_encoding="rope")
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            max_position_embeddings=shape.length,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size * 2 // 3,  # three matrices instead of two
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            tie_word_embeddings=True,
        )
    )
    inputs = {"input_ids": sequences.filled_ids, "labels": sequences.labels, "use_cache": False}
    return as_candidate(model, model.model, config, inputs)


@TRAINING.add(needs="x_transformers")
def x_rotary(shape: Shape, sequences: Sequences) -> Candidate:
    """x-transformers with rotary positions."""
    return _of_x_transformers(shape, sequences.filled_ids, sequences.labels)


@TRAINING.add(needs="x_transformers")
def x_memory(shape: Shape, sequences: Sequences) -> Candidate:
    """x-transformers with rotary positions and a memory token before every nine text tokens."""
    memory = {"num_memory_tokens": 1, "memory_tokens_interspersed_every": EVERY}
    found = _of_x_transformers(shape, sequences.text_ids, sequences.text_labels, **memory)
    groups = math.ceil(found.num_positions / EVERY)
    return found._replace(num_positions=groups * (EVERY + 1))


def _ours(model: MetaTokenForCausalLM, ids: Tensor, labels: Tensor) -> Candidate:
    inputs = {"input_ids": ids, "labels": labels, "use_cache": False}
    return as_candidate(model, model.model, model.config, inputs)


def _dense(model_class: type[DenseReferenceForCausalLM], shape: Shape, sequences: Sequences) -> Candidate:
    packed = shape.build()
    model = model_class(packed.config)
    model.load_state_dict(packed.state_dict())
    return _ours(model, sequences.ids, sequences.labels)._replace(num_meta=sequences.meta_indices.shape[1])


class DenseFusedBlock(DenseReferenceBlock):
    """Dense meta-attention with the (B, T, T) mask given to the fused kernel."""

    def add_meta_attention(self, hidden: Tensor, update: Tensor, pack: Any, past_key_values: Any) -> Tensor:
        """Add an update, and then the dense meta-attention to every row of (B, T, C)."""
        del past_key_values
        hidden = hidden + update
        attention: Any = self.meta_attn
        query, key, value = attention.project(self.meta_layernorm(hidden), pack.rotary)
        output = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=pack.mask)
        output = attention.o_proj(output.transpose(1, 2).flatten(2))
        return hidden + torch.where(pack.is_meta[..., None], output, 0)


class _DensePack(NamedTuple):
    is_meta: Tensor
    rotary: Any
    mask: Tensor


class DenseFusedModel(DenseReferenceModel):
    """The decoder of `dense_fused`."""

    block_class = DenseFusedBlock

    def _pack(self, hidden: Tensor, **inputs: Any) -> Any:
        is_meta = inputs["meta_token_mask"]
        length, device = hidden.shape[1], hidden.device
        causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        # each other row sees itself alone, so that none is empty; its output is dropped
        itself = torch.eye(length, dtype=torch.bool, device=device)
        mask = (causal & is_meta[:, None, :, None] & is_meta[:, None, None, :]) | itself
        return _DensePack(is_meta, inputs["rotary"], mask)


class DenseFusedForCausalLM(DenseReferenceForCausalLM):
    """The model of `dense_fused`."""

    model_class = DenseFusedModel


class _XDecoder(nn.Module):
    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, input_ids: Tensor) -> MetaTokenModelOutput:
        return MetaTokenModelOutput(last_hidden_state=self.transformer(input_ids, return_embeddings=True))


class _XForCausalLM(nn.Module):
    """x-transformers' model with the loss of its own wrapper: cross-entropy of all logits."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.decoder = _XDecoder(transformer)

    def forward(self, input_ids: Tensor, shift_labels: Tensor) -> MetaTokenCausalLMOutput:
        logits = self.decoder.transformer(input_ids)
        return MetaTokenCausalLMOutput(loss=nn.functional.cross_entropy(logits.flatten(0, 1), shift_labels.flatten()))


def _of_x_transformers(shape: Shape, ids: Tensor, labels: Tensor, **memory: Any) -> Candidate:
    from x_transformers import Decoder, TransformerWrapper

    config = shape.hf_config(meta_attention_layers="none", position_encoding="rope")
    torch.manual_seed(0)
    assert config.head_dim is not None
    layers = Decoder(
        dim=config.hidden_size,
        depth=config.num_hidden_layers,
        heads=config.num_attention_heads,
        attn_dim_head=config.head_dim,
        rotary_pos_emb=True,
        attn_flash=True,
    )
    transformer = TransformerWrapper(
        num_tokens=config.vocab_size,
        max_seq_len=shape.length,
        attn_layers=layers,
        use_abs_pos_emb=False,
        tie_embedding=True,
        **memory,
    )
    model = _XForCausalLM(transformer)
    targets = targets_of_labels(labels, torch.zeros_like(labels, dtype=torch.bool), "skip")
    return as_candidate(model, model.decoder, config, {"input_ids": ids, "shift_labels": targets})
