"""Any causal language model of transformers as an arm: GPT-Neo-125M from the hub, or a folder.

The adapter adds a meta-token and a padding token, each with a new row of the embedding, and offers the call of
`MetaTokenForCausalLM`, so that the same training and evaluation can use it. The wrapped model stays as it came and is
saved as an ordinary transformers checkpoint. It has no meta-attention, so meta-tokens are pause tokens to it. Its
weights are read from safetensors alone, and code that comes with a model is not run.
"""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cache,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from metatokens.config.schema import VOCABULARY_MULTIPLE
from metatokens.model.compatibility import CACHE_NAME, one_cache
from metatokens.model.loss import loss_and_logits, targets_of_labels
from metatokens.model.outputs import MetaTokenCausalLMOutput
from metatokens.model.schedule import generate


class PretrainedCausalLM(nn.Module):
    """A model of transformers under the call of `MetaTokenForCausalLM`.

    Attributes:
        wrapped: the model itself; `generate`, PEFT and whatever else transformers knows take it.
        config: its config, with `meta_token_id` (None for a grafted model), `pad_token_id` and `loss_policy`.
    """

    def __init__(self, wrapped: PreTrainedModel) -> None:
        """Wrap a model whose config and embedding have the meta-token already.

        Raises:
            ValueError: if it does more between its last hidden state and its logits than a linear head, since the loss
                here would not be its own. A model on the meta device has no weights and is not checked.
        """
        super().__init__()
        self.wrapped = wrapped
        self._takes_positions = "position_ids" in inspect.signature(wrapped.forward).parameters
        if self.device.type != "meta":
            self._check_head()

    @property
    def config(self) -> PreTrainedConfig:
        """Return the config of the wrapped model."""
        return self.wrapped.config

    @property
    def generation_config(self) -> GenerationConfig:
        """Return the generation config of the wrapped model."""
        generation_config: GenerationConfig = self.wrapped.generation_config
        return generation_config

    @property
    def device(self) -> torch.device:
        """Return the device of the weights."""
        device: torch.device = self.wrapped.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the weights."""
        dtype: torch.dtype = self.wrapped.dtype
        return dtype

    @property
    def _tied_weights_keys(self) -> dict[str, str]:
        """Return the names of tied tensors, which are stored once."""
        tied: dict[str, str] = self.wrapped.all_tied_weights_keys
        return tied

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        meta_indices: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        use_cache: bool = False,
        logits_to_keep: int | Tensor = 0,
    ) -> MetaTokenCausalLMOutput:
        """Run the model, with arguments and result of `MetaTokenForCausalLM.forward`; `meta_indices` has no effect."""
        outputs = self._decode(
            input_ids,
            attention_mask,
            meta_indices=meta_indices,
            past_key_values=past_key_values,
            cache=cache,
            use_cache=use_cache,
        )
        hidden = outputs.last_hidden_state
        if shift_labels is None and labels is not None:
            meta_token_id = -1 if self.config.meta_token_id is None else self.config.meta_token_id
            is_meta = input_ids == meta_token_id
            shift_labels = targets_of_labels(labels, is_meta, self.config.loss_policy)
        head = self.get_output_embeddings()
        loss, logits = loss_and_logits(
            head,
            hidden,
            shift_labels,
            vocab_size=self.config.vocab_size,
            wants_logits=not self.training,
            logits_to_keep=logits_to_keep,
            num_items_in_batch=num_items_in_batch,
        )
        return MetaTokenCausalLMOutput(loss=loss, logits=logits, **{CACHE_NAME: outputs.get(CACHE_NAME)})

    def get_decoder(self) -> Callable[..., Any]:
        """Return the model without its head, under the call of `MetaTokenModel`."""
        return self._decode

    def get_output_embeddings(self) -> Any:
        """Return the head."""
        return self.wrapped.get_output_embeddings()

    def _decode(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        meta_indices: Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        use_cache: bool = False,
    ) -> Any:
        del meta_indices
        inputs: dict[str, Any] = {}
        if attention_mask is not None and self._takes_positions:
            # positions count from a row's first real token, as in the package's own models
            inputs["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        past_key_values = one_cache(past_key_values, cache)
        if past_key_values is not None:
            inputs[CACHE_NAME] = past_key_values
        return self.wrapped.base_model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache, **inputs
        )

    def generate(self, *args: Any, **options: Any) -> Any:
        """Generate with the wrapped model."""
        return generate(*args, model=self.wrapped, **options)

    def state_dict(self, *args: Any, **options: Any) -> dict[str, Any]:  # type: ignore[override] # torch overloads it
        """Return the tensors under the names that they have in the checkpoint."""
        tensors: dict[str, Any] = self.wrapped.state_dict(*args, **options)
        return tensors

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load tensors under the names that they have in the checkpoint."""
        return self.wrapped.load_state_dict(state_dict, strict=strict, assign=assign)

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:
        """Save the wrapped model as transformers does; `load_pretrained` and its own class load it."""
        self.wrapped.save_pretrained(folder, **options)

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """Recompute activations in the backward pass."""
        self.wrapped.gradient_checkpointing_enable(**options)

    def num_parameters(self) -> int:
        """Return the number of parameters, a tied head counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def training_flops(self, *, num_positions: int, num_meta: int = 0, num_logits: int | None = None) -> int:
        """Count the operations of a forward and backward pass over one sequence: 6 N a position, and the attention.

        N is the number of weights in matrices, without embeddings and head: each is multiplied once a position in the
        forward pass and twice in the backward pass. The head counts where logits are made. Attention counts scores and
        weighted sum over all pairs that causality allows, even in layers that see only a window. For a GPT-2 that is
        what `metatokens.model.accounting` counts; experts that a token does not visit count too.

        Args:
            num_positions: T, text and meta-tokens.
            num_meta: M, meta-tokens among them.
            num_logits: positions whose logits are made; by default those of the text tokens.
        """
        config: Any = self.config.get_text_config()
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        pairs = num_positions * (num_positions + 1) // 2
        attention = config.num_hidden_layers * 2 * 2 * config.num_attention_heads * head_size * pairs
        logits = num_positions - num_meta if num_logits is None else num_logits
        head = 2 * logits * self.get_output_embeddings().weight.numel()
        flops: int = 3 * (2 * num_positions * self._num_matrix_weights() + attention + head)
        return flops

    def _num_matrix_weights(self) -> int:
        tables = [module.weight for module in self.modules() if isinstance(module, nn.Embedding)]
        apart = {id(weight) for weight in (*tables, self.get_output_embeddings().weight)}
        return sum(p.numel() for p in self.parameters() if p.ndim >= 2 and id(p) not in apart)

    @torch.no_grad()
    def _check_head(self) -> None:
        was_training = self.wrapped.training
        self.wrapped.eval()
        ids = torch.arange(4, device=self.device)[None]
        own, ours = self.wrapped(ids, use_cache=False).logits, self(ids).logits
        self.wrapped.train(was_training)
        if not torch.equal(own, ours):
            raise ValueError(
                f"{type(self.wrapped).__name__} does more between its last hidden state and its logits than a linear "
                "head, so its loss cannot be computed here: use another model"
            )


def load_pretrained(
    source: str | Path, *, text_vocab_size: int, loss_policy: str | None = None, seed: int = 0, **options: Any
) -> PretrainedCausalLM:
    """Load a causal language model of transformers and give it a meta-token and padding.

    The meta-token is the first id after the text vocabulary and padding the next one, as in the package's own models;
    the embedding grows to a multiple of 64 rows. New rows, and unused rows beyond the text vocabulary, are drawn from
    N(0, initializer_range). A model that was saved by the adapter comes back as it was.

    Args:
        source: an id on the hub (`EleutherAI/gpt-neo-125m`) or a folder.
        text_vocab_size: number of tokens of its text tokenizer.
        loss_policy: "skip" or "retarget"; None keeps that of a model saved by the adapter, and is "skip" for others.
        seed: seed of the new rows; the global generator keeps its state.
        **options: passed to `from_pretrained`; `dtype` is float32 unless it is among them.

    Raises:
        ValueError: if weights that its config describes are missing or have another shape, if the model has no row for
            some text token, or if its head is not linear.
        OSError: if there is no such model, or none in safetensors.
    """
    wrapped: Any = load_plain(source, **options)
    config = wrapped.config
    rows = _check_rows(config, wrapped.get_input_embeddings().weight.shape[0], source, text_vocab_size)
    if getattr(config, "meta_token_id", None) != text_vocab_size:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            wrapped.resize_token_embeddings(rows, mean_resizing=False)
            _draw_new_rows(wrapped, text_vocab_size)
    _set_tokens(config, text_vocab_size, loss_policy)
    # the meta-token is never a target, so its logit means nothing
    wrapped.generation_config.suppress_tokens = [config.meta_token_id, config.pad_token_id]
    wrapped.generation_config.pad_token_id = config.pad_token_id
    return PretrainedCausalLM(wrapped)


def load_plain(source: str | Path, **options: Any) -> PreTrainedModel:
    """Load a causal language model of transformers as it is, from safetensors alone.

    Args:
        source: an id on the hub or a folder.
        **options: passed to `from_pretrained`; `dtype` is float32 unless it is among them.

    Raises:
        ValueError: if weights that its config describes are missing or have another shape.
        OSError: if there is no such model, or none in safetensors.
    """
    model, loaded = AutoModelForCausalLM.from_pretrained(
        source,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # refused below, by name
        use_safetensors=True,
        trust_remote_code=False,
        **{"dtype": torch.float32, **options},
    )
    # unexpected weights do no harm: they are of other heads, or masks that older versions of transformers stored
    wrong = [f"no {name}" for name in sorted(loaded["missing_keys"])]
    wrong += [f"{name} of {tuple(found)}, not {tuple(own)}" for name, found, own in sorted(loaded["mismatched_keys"])]
    if wrong:
        raise ValueError(f"the weights of {source} are not those that its config describes: {wrong[0]}")
    loaded_model: PreTrainedModel = model
    return loaded_model


def build_pretrained_on_meta_device(folder: Path, *, text_vocab_size: int) -> PretrainedCausalLM:
    """Return the model that `load_pretrained` would make from a folder's config, without weights, on the meta device.

    Raises:
        ValueError: if the model has no row for some text token, or is not a causal language model.
        OSError: if there is no such config.
    """
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    config.vocab_size = _check_rows(config, config.vocab_size, folder, text_vocab_size)
    _set_tokens(config, text_vocab_size, None)
    with torch.device("meta"):
        return PretrainedCausalLM(
            AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
        )


def _check_rows(config: PreTrainedConfig, rows: int, source: str | Path, text_vocab_size: int) -> int:
    """Return the rows that the embedding needs."""
    if rows < text_vocab_size:
        raise ValueError(f"{source} has {rows} rows in its embedding, fewer than the {text_vocab_size} text tokens")
    if getattr(config, "meta_token_id", None) == text_vocab_size:
        return rows
    return max(rows, -(-(text_vocab_size + 2) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE)


def _set_tokens(config: PreTrainedConfig, text_vocab_size: int, loss_policy: str | None) -> None:
    config.meta_token_id, config.pad_token_id = text_vocab_size, text_vocab_size + 1
    config.loss_policy = loss_policy or getattr(config, "loss_policy", "skip")


@torch.no_grad()
def _draw_new_rows(model: PreTrainedModel, first: int) -> None:
    std = getattr(model.config, "initializer_range", 0.02)  # GPT-2's
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    matrices = {id(module.weight): module.weight for module in (embedding, head)}  # tied: one matrix
    for weight in matrices.values():
        weight[first:] = std * torch.randn(weight[first:].shape, dtype=torch.float32).to(weight)
    if getattr(head, "bias", None) is not None:
        head.bias[first:] = 0
