"""A text that a model in memory mode has read, as a file: read once, asked many times.

The file is safetensors: the columns of the cache that memory mode keeps, what is known of them, and as metadata what
was counted, the schedule of the meta-tokens, the digest of the model, and one of all of this. It fits no other model.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import DynamicCache

from metatokens.data.tokenizer import TextEncoder, as_text_tokenizer
from metatokens.errors import DataError, ResourceError, UsageError
from metatokens.generation.stepping import read_into
from metatokens.graft.grafting import NAME as GRAFT
from metatokens.graft.grafting import memory_of
from metatokens.model.accounting import cache_bytes
from metatokens.model.configuration import ENDLESS, MetaTokenConfig
from metatokens.model.memory import MemoryPolicy
from metatokens.model.memory_cache import MemoryState, shared_state
from metatokens.model.schedule import MetaSchedule, read_schedule, schedule_meta_tokens
from metatokens.storage import commit, json_sha256, write_durably

if TYPE_CHECKING:
    from metatokens.data.tokenizer import AnyTokenizer

FORMAT = "metatokens compressed document 2"
_META_PARTS = ("meta_keys", "meta_values", "meta_columns")
_LAYER_PARTS = ("keys", "values", *_META_PARTS)


class Read(NamedTuple):
    """What was read before a prompt."""

    num_text: int = 0
    num_meta: int = 0
    after_meta: bool = False
    """Whether the last token was a meta-token."""

    @property
    def num_positions(self) -> int:
        """All tokens."""
        return self.num_text + self.num_meta

    @classmethod
    def of_plain(cls, values: Any) -> Self:
        """Return what was read, from the plain values of a file.

        Raises:
            ValueError: they are not two counts, of a text that is not empty, and a bool.
        """
        is_read = isinstance(values, list) and [type(value) for value in values] == [int, int, bool]
        if not (is_read and values[0] >= 1 and values[1] >= 0):
            raise ValueError(f"what was read as {values!r}")
        return cls(*values)


@dataclasses.dataclass(frozen=True)
class CompressedDocument:
    """A text in the cache of a model in memory mode."""

    tensors: Mapping[str, Tensor]
    """The cache, on the CPU."""
    read: Read
    schedule: MetaSchedule
    """By which the text got its meta-tokens; what follows it gets them by the same one."""
    model: str
    """Digest of the model that read it."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the keys and values."""
        return sum(tensor.nbytes for name, tensor in self.tensors.items() if name.endswith(("keys", "values")))

    def num_bytes_of_all(self, config: Any) -> int:
        """Return the bytes of a cache that keeps every token, text and meta-tokens."""
        if not isinstance(config, MetaTokenConfig):  # of a graft, all of whose layers are alike
            held = [tensor for name, tensor in self.tensors.items() if name.endswith((".keys", ".values"))]
            return sum(tensor.nbytes // tensor.shape[2] * self.read.num_text for tensor in held)
        number = next(tensor for name, tensor in self.tensors.items() if name.startswith("layers."))
        everything = copy.deepcopy(config)
        everything.memory = None
        read = {"num_positions": self.read.num_positions, "num_meta": self.read.num_meta}
        return cache_bytes(everything, **read, bytes_per_number=number.element_size()).total

    def check_model(self, model: Any) -> None:
        """Compare a model with the one that read the text.

        Raises:
            UsageError: if it is another one.
        """
        found = model_digest(model)
        if found != self.model:
            raise UsageError(
                "compressed document",
                expected=f"the model that read it, {self.model[:12]}...",
                found=f"{found[:12]}...",
                remedy="compress the document with this model, or open the model that read it",
            )

    def to_cache(self, model: Any) -> DynamicCache:
        """Return a cache of its own for each call, on the device of the model, which may go on reading.

        Raises:
            UsageError: if it is another model than the one that read the text.
            DataError: a part of the cache is missing.
        """
        self.check_model(model)
        policy, cache = _memory_of(model)
        self._check_parts(len(cache.layers))
        tensors = {name: tensor.to(model.device, copy=True) for name, tensor in self.tensors.items()}
        for index, layer in enumerate(cache.layers):
            parts = {part: tensors.get(f"layers.{index}.{part}") for part in _LAYER_PARTS}
            layer.lazy_initialization(parts["keys"], parts["values"])
            for part, tensor in parts.items():
                if tensor is not None:
                    setattr(layer, part, tensor)
        state = shared_state(policy, cache)
        assert state is not None
        state.restore({name.removeprefix("state."): t for name, t in tensors.items() if name.startswith("state.")})
        return cache

    def _check_parts(self, num_layers: int) -> None:
        """Raise DataError if one of the tensors that the cache of every model has is missing."""
        needed = {f"layers.{index}.{part}" for index in range(num_layers) for part in ("keys", "values")}
        needed |= {f"state.{name}" for name in MemoryState.names()}
        # meta-attention has a cache of its own, in some layers, whose parts come together
        for index in range(num_layers):
            names = {f"layers.{index}.{part}" for part in _META_PARTS}
            needed |= names if names & self.tensors.keys() else set()
        if missing := sorted(needed - self.tensors.keys()):
            raise DataError(
                "compressed document",
                expected=f"the cache of {num_layers} layers",
                found=f"none of {', '.join(missing)}",
                remedy="make it with `metatokens compress`",
            )

    def save(self, path: str | Path) -> None:
        """Write the file; it is complete or absent.

        Raises:
            ResourceError: the file cannot be written.
        """
        path = Path(path)
        content = {
            "format": FORMAT,
            "model": self.model,
            "read": json.dumps(self.read),
            "schedule": json.dumps(dataclasses.asdict(self.schedule)),
        }
        content["digest"] = content_digest(content, self.tensors)
        temporary = path.with_name(f".{path.name}.unfinished")
        try:
            temporary.unlink(missing_ok=True)
            write_durably(temporary, save({name: t.contiguous() for name, t in self.tensors.items()}, content))
            commit(temporary, path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise ResourceError.no_room(path, error) from None

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file.

        Raises:
            DataError: there is none, it is no compressed document, or it is damaged.
        """
        try:
            with safe_open(path, framework="pt") as file:
                content = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
            if content.get("format") != FORMAT:
                raise ValueError(f"the format {content.get('format')!r}")
            if content_digest(content, tensors) != content.get("digest"):
                raise ValueError("another content than was written")
            schedule = read_schedule(json.loads(content["schedule"]))
            if schedule is None:
                raise ValueError("no schedule of meta-tokens")
            return cls(tensors, Read.of_plain(json.loads(content["read"])), schedule, content["model"])
        except KeyError as error:
            raise _no_document(path, f"no {error}") from None
        except (OSError, SafetensorError, ValueError) as error:
            raise _no_document(path, str(error)) from None


def _no_document(path: str | Path, found: str) -> DataError:
    expected = f"a {FORMAT.rpartition(' ')[0]}"
    return DataError(str(path), expected=expected, found=found, remedy="make it with `metatokens compress`")


@torch.no_grad()
def compress_document(model: Any, tokenizer: AnyTokenizer, text: str, *, schedule: MetaSchedule) -> CompressedDocument:
    """Read a text with a model in memory mode, and keep what its cache keeps.

    Args:
        model: A `MetaTokenForCausalLM` in memory mode, or a graft, in evaluation mode.
        tokenizer: Its tokenizer.
        text: The document, read as plain text.
        schedule: Where meta-tokens go.

    Raises:
        UsageError: The model has no memory mode, or the text is empty or longer than the model.
    """
    policy, cache = _memory_of(model)
    text_ids = TextEncoder(as_text_tokenizer(tokenizer)).encode_batch([text])[0].tolist()
    ids = text_ids
    meta_token_id: int | None = getattr(model.config, "meta_token_id", None)
    if meta_token_id is not None:
        ids = schedule_meta_tokens(text_ids, schedule, meta_token_id=meta_token_id)
    num_positions = len(text_ids) if policy.positions == "text" else len(ids)
    longest = getattr(model.config, "max_sequence_length", None) or model.config.max_position_embeddings
    limit = ENDLESS if policy.positions == "compact" else longest
    if not 0 < num_positions <= limit:
        raise UsageError(
            "document",
            expected=f"1 to {limit} positions, as many as the model has",
            found=str(num_positions),
            remedy="shorten the text, or train with compact positions" if ids else "give it a text",
        )
    read_into(model, ids, cache)
    state = shared_state(policy, cache)
    assert state is not None
    read = Read(len(text_ids), len(ids) - len(text_ids), ids[-1] == meta_token_id)
    return CompressedDocument(_tensors_of(cache, state), read, copy.copy(schedule), model_digest(model))


def _memory_of(model: Any) -> tuple[MemoryPolicy, DynamicCache]:
    """Return the policy and an empty cache of a model in memory mode.

    Raises:
        UsageError: it has none.
    """
    policy: MemoryPolicy | None = getattr(model.config, "memory_policy", None)
    if policy is not None:
        return policy, DynamicCache(config=model.config)
    if (grafted := memory_of(model)) is not None:
        return grafted
    raise UsageError(
        "model",
        expected="one in memory mode, or a graft",
        found=f"a {model.config.model_type} that keeps every token in its cache",
        remedy="train one with --model.attention.kind memory, such as the preset tiny/memory",
    )


def model_digest(model: Any) -> str:
    """Return the SHA-256 of the weights of a model and of what its config says about what they compute."""
    added = getattr(getattr(model, "wrapped", model), GRAFT, None)
    fields = sorted(MetaTokenConfig.__annotations__.keys() - {"use_cache", "model_type"})
    config = {name: getattr(model.config, name, None) for name in fields if not name.startswith("_")}
    if added is not None:
        config["graft"] = dataclasses.asdict(added.config)
    plain = json.loads(json.dumps(config, default=str))
    return hashlib.sha256((json_sha256(plain) + tensors_digest(model.state_dict())).encode()).hexdigest()


def content_digest(content: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of a file's metadata, but for the digest itself, and of its tensors."""
    stated = {name: value for name, value in content.items() if name != "digest"}
    return hashlib.sha256((json_sha256(stated) + tensors_digest(tensors)).encode()).hexdigest()


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of named tensors: names, types, shapes and content."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _tensors_of(cache: DynamicCache, state: MemoryState) -> dict[str, Tensor]:
    tensors = {f"state.{name}": tensor for name, tensor in state.to_tensors().items()}
    for index, layer in enumerate(cache.layers):
        for part in _LAYER_PARTS:
            tensor = getattr(layer, part, None)
            if tensor is not None:
                tensors[f"layers.{index}.{part}"] = tensor
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
