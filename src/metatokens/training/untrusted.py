"""Checks of a model's folder that may come from anyone, before anything builds or reads what it describes.

They cost time and memory in proportion to the files, whatever sizes these state, and need no torch. What they let
pass may still be wrong: `metatokens.training.loading` compares names and shapes of the weights.
"""

import json
from pathlib import Path
from typing import Any

from metatokens.errors import CheckpointError

MANIFEST = "manifest.json"
OPENED = ["*.json", "*.safetensors", "merges.txt"]
"""The files of a hub repository that open a model: only safetensors weights, nothing in subfolders."""
_ACTS = (*OPENED, "*.jinja")  # what transformers would read of a folder
_ADAPTER = "adapter_config.json"
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
WEIGHT_SHARDS = "shard-*-model-00001-of-*.safetensors"
"""Where each process has written its part of a checkpoint's weights; the moments are in files of another number."""
_IMPLEMENTATIONS = ("attn_implementation", "_attn_implementation", "experts_implementation")
_LARGEST_JSON = 16 << 20  # the header of a shard with 100,000 tensors has about 10 MiB
_LARGEST_SIZE = 1 << 31
# under the names of transformers and of GPT-2
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_SIZES = {
    "vocab_size",
    *("hidden_size", "n_embd", "d_model", "intermediate_size", "n_inner", "head_dim"),
    *("num_attention_heads", "n_head", "num_heads", "num_key_value_heads", "max_position_embeddings", "n_positions"),
}
_WIDTHS = ("hidden_size", "n_embd", "d_model")
_MOST_TIMES = 64  # no honest mistake makes a config describe this many times the weights in the folder


def check_files(folder: Path) -> None:
    """Refuse files that would change the model although nothing vouches for them.

    That is an adapter, which acts only where PEFT is installed, and beside a manifest each file that it does not list.
    A manifest that cannot be read is left to `metatokens.training.checkpoint.verify_model`.

    Raises:
        CheckpointError: naming the file.
    """
    if (folder / _ADAPTER).exists():
        raise CheckpointError(
            str(folder / _ADAPTER),
            expected="a model without an adapter beside it",
            found="one that transformers would apply where PEFT is installed",
            remedy="merge it into the model, or move it elsewhere",
        )
    try:
        listed = json.loads(_bounded(folder / MANIFEST))["files"].keys()
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return
    found = {path.name for pattern in _ACTS for path in folder.glob(pattern)} - {MANIFEST}
    if unlisted := sorted(found - set(listed)):
        raise CheckpointError(
            str(folder / unlisted[0]),
            expected=f"only files that {MANIFEST} lists",
            found="another that transformers may read",
            remedy=f"move it elsewhere; if the change is yours, remove {MANIFEST}",
        )


def read_config(folder: Path) -> dict[str, Any]:
    """Return the config.json of a model.

    Raises:
        CheckpointError: it is no JSON object, asks for code from the hub, or describes a model out of all proportion to
            the weights.
    """
    config = _read_object(folder / "config.json", "the JSON of a model of this package")
    # transformers takes such a name for a kernel of the hub, which is code
    if kernels := [key for key in _IMPLEMENTATIONS if "/" in str(config.get(key))]:
        raise CheckpointError(
            str(folder / "config.json"),
            expected=f"an {kernels[0]} of transformers",
            found=f"{config[kernels[0]]!r}, code from the hub",
            remedy="remove the entry",
        )
    _check_sizes(folder, config)
    return config


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model: one, those that its index names, the parts of a checkpoint, or none.

    Raises:
        CheckpointError: the index cannot be read, or names a file outside the folder.
    """
    if (folder / _WEIGHTS).exists():
        return [folder / _WEIGHTS]
    if not (folder / _INDEX).exists():
        return sorted(folder.glob(WEIGHT_SHARDS))
    names = _read_object(folder / _INDEX, "the index of sharded weights").get("weight_map")
    if not isinstance(names, dict):
        raise _refusal(folder / _INDEX, "a weight_map", "none")
    for name in names.values():
        if not isinstance(name, str) or name != Path(name).name:
            raise _refusal(folder / _INDEX, "names of files in the same folder", repr(name))
    return [folder / name for name in sorted(set(names.values()))]


def _check_sizes(folder: Path, config: dict[str, Any]) -> None:
    """Refuse a config whose model would take far more time or memory than the weights that there are."""
    sizes = {key: value for key, value in config.items() if key in {*_SIZES, *_LAYERS} and isinstance(value, int)}
    for key, value in sizes.items():
        if value > _LARGEST_SIZE:
            raise _refusal(folder / "config.json", f"a {key} of at most {_LARGEST_SIZE}", str(value))
    files = [path for path in weight_files(folder) if path.is_file()]
    if not files:
        return  # refused where the weights are opened
    layers = max((sizes[key] for key in _LAYERS if key in sizes), default=1)
    width = max((sizes[key] for key in _WIDTHS if key in sizes), default=1)
    num_tensors = sum(_count_tensors(path) for path in files)
    if layers > num_tensors:
        raise _refusal(folder / "config.json", f"layers for the {num_tensors} tensors of the weights", f"{layers}")
    described = width * (sizes.get("vocab_size", 1) + layers * width)
    stored = sum(path.stat().st_size for path in files)
    if described > _MOST_TIMES * stored:
        found = f"one of {described} parameters or more"
        raise _refusal(folder / "config.json", f"a model for the {stored} bytes of its weights", found)


def _count_tensors(file: Path) -> int:
    """Return how many tensors a safetensors file holds, from a header of bounded size."""
    expected = "a safetensors file"
    with file.open("rb") as content:
        length = int.from_bytes(content.read(8), "little")
        if length > min(_LARGEST_JSON, file.stat().st_size - 8):
            raise _refusal(file, expected, f"a header of {length} bytes")
        try:
            header = json.loads(content.read(length))
        except (ValueError, RecursionError) as error:
            raise _refusal(file, expected, str(error)) from None
    if not isinstance(header, dict):
        raise _refusal(file, expected, "another header")
    return len(header)


def _read_object(file: Path, expected: str) -> dict[str, Any]:
    try:
        found = json.loads(_bounded(file))
    except (OSError, ValueError, RecursionError) as error:
        raise _refusal(file, expected, str(error)) from None
    if not isinstance(found, dict):
        raise _refusal(file, expected, f"a {type(found).__name__}")
    return found


def _bounded(file: Path) -> str:
    """Return the text of a small file."""
    with file.open("rb") as content:
        found = content.read(_LARGEST_JSON + 1)
    if len(found) > _LARGEST_JSON:
        raise ValueError(f"more than {_LARGEST_JSON} bytes")
    return found.decode()


def _refusal(file: Path, expected: str, found: str) -> CheckpointError:
    return CheckpointError(str(file), expected=expected, found=found, remedy="use another checkpoint")
