"""Changes: which keys of a run's config may change when the run continues.

Keys are of three classes. Free ones change how a run is computed or what it leaves, not what it computes. Those of the
plan, such as the learning rate, make another run of it, which `--allow-change` permits by name. A change of any other
key, such as the shape of the model, the data or the seed, makes it another run.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel

from metatokens.config.loading import flatten, override_fields
from metatokens.errors import UsageError, redact_values
from metatokens.names import nearest_name

# the path of the initial weights is free too: TrainingSetup.content_id identifies the weights themselves
FREE_KEYS = {
    "start": {"path"},
    "data": {"path", "verify"},
    "training": {
        *("micro_batch_blocks", "compile", "gradient_checkpointing", "device"),
        *("parallel", "distributed_timeout_seconds", "step_timeout_seconds"),
    },
}
FREE_SECTIONS = {"evaluation", "checkpoint", "logging", "test", "start_from", "base"}
_PLANNED_SECTIONS = ("optimizer", "schedule", "solve")
_PLANNED_KEYS = ("training.duration", "training.precision", "training.deterministic", "training.skip_spikes")

Difference = tuple[str, object, object]
"""A key, its old and its new value."""


def check_allowed(allowed: Sequence[str], schema: type[BaseModel]) -> None:
    """Refuse a key of `--allow-change` that is no key, or that no run may change.

    Raises:
        UsageError: naming it.
    """
    for key in allowed:
        planned = [name for name in flatten(schema().model_dump()) if _is_planned(name)]
        if not _is_planned(key):
            raise UsageError(
                f"--allow-change {key}",
                expected=f"a key of {', '.join((*_PLANNED_SECTIONS, *_PLANNED_KEYS))}",
                found="one whose change makes another run, or none",
                remedy=nearest_name(key, planned) or "name such a key, or choose another --out",
            )


def differences(stored: BaseModel, config: BaseModel, allowed: Sequence[str] = ()) -> Iterator[Difference]:
    """Yield each difference between two configs that makes them different runs, unless it is allowed."""
    for key, old, new in _differences(stored, config):
        if not any(_is_part(key, name) or _is_part(name, key) for name in allowed):
            yield key, old, new


def differences_from_tree(
    tree: dict[str, Any], config: BaseModel, origin: str, allowed: Sequence[str] = ()
) -> Iterator[Difference]:
    """Yield each difference between a config and the one that a checkpoint holds, as `differences` does.

    A checkpoint holds the whole config of its run. A key that the schema gained later is read as its default, so that
    default must mean what runs did before the key existed. If a default has changed since, the stored value differs.

    Args:
        tree: `TrainingState.config`.
        config: of the run that would continue from the checkpoint.
        origin: name of the checkpoint, for messages.
        allowed: keys that may differ.

    Raises:
        UsageError: if the tree is not a config of this version.
    """
    yield from differences(override_fields(type(config)(), tree, origin), config, allowed)


def remedy_for(key: str, otherwise: str) -> str:
    """Return what to do about a difference."""
    return f"{otherwise}, or pass --allow-change {key}" if _is_planned(key) else otherwise


def _is_planned(key: str) -> bool:
    return any(_is_part(key, planned) for planned in (*_PLANNED_SECTIONS, *_PLANNED_KEYS))


def _is_part(key: str, whole: str) -> bool:
    return key == whole or key.startswith(f"{whole}.")


def _differences(stored: BaseModel, config: BaseModel) -> Iterator[Difference]:
    # what a run has written of its config has no secrets
    old_tree, new_tree = (redact_values(one.model_dump(mode="json")) for one in (stored, config))
    for section, new in new_tree.items():
        old = old_tree[section]
        if section in FREE_SECTIONS or old == new:
            continue
        if not (isinstance(old, dict) and isinstance(new, dict)):
            yield section, old, new
            continue
        # the kind first: the other keys follow from it
        for key in sorted(new.keys() | old.keys(), key=lambda key: (key != "kind", key)):
            if key not in FREE_KEYS.get(section, set()) and old.get(key) != new.get(key):
                yield f"{section}.{key}", old.get(key), new.get(key)
