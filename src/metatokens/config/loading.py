"""Presets: find, extend, override and validate them, and write a resolved config in the same format.

A preset is YAML that holds only its differences from the preset that `extends:` names. An override is `--section.key
value`; the value is read as YAML. Every error is one line; for an unknown preset or key it gives the nearest name.
"""

import difflib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, TypeVar, overload

import yaml
from pydantic import BaseModel, ValidationError

from metatokens.config.fields import kind_of, nearest_key
from metatokens.config.schema import PretrainConfig
from metatokens.errors import UsageError
from metatokens.names import nearest_name
from metatokens.storage import json_sha256, unseal

Config = TypeVar("Config", bound=BaseModel)

MAX_PRESET_BYTES = 2**20
YAML_SUFFIXES = (".yaml", ".yml")
NOT_DECIMAL = re.compile(r"[-+]?0[0-9]+|.*:.*")
# keys that only presets of a verb have, in the order in which they are looked for
_KEYS_OF_VERBS = {
    "graft": {"graft", "base", "objectives"},
    "finetune": {"task", "curriculum", "start"},
    "pretrain": {"model", "data", "injection", "start_from"},
}
NOT_SCIENCE = {
    "path",
    "verify",
    "compile",
    "device",
    "deterministic",
    "parallel",
    "distributed_timeout_seconds",
    "step_timeout_seconds",
    "micro_batch_blocks",
    "gradient_checkpointing",
}
"""Keys that change how a run is computed, not what it computes."""


class _StrictLoader(yaml.SafeLoader):
    """A safe loader that refuses duplicate keys and aliases, and reads numbers as people do.

    In YAML 1.1, 010 is eight, 1:30 is ninety, and 1e6 and 1.5e3 are strings. Here 010 is ten, 1:30 is an error, and 1e6
    and 1.5e3 are numbers.
    """

    def construct_yaml_int(self, node: Any) -> Any:
        text = str(self.construct_scalar(node))
        # the schema reads the text as a decimal number
        return text if NOT_DECIMAL.fullmatch(text) else super().construct_yaml_int(node)

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not allowed in a preset")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        duplicates = {str(key) for key in keys if keys.count(key) > 1}
        if duplicates:
            raise yaml.YAMLError(f"duplicate key {sorted(duplicates)[0]}")
        return super().construct_mapping(node, deep)


_StrictLoader.add_constructor("tag:yaml.org,2002:int", _StrictLoader.construct_yaml_int)
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


# the expected value for each error type of pydantic, in the words of YAML
_EXPECTED = {
    "tuple_type": "a list, as [2, 4]",
    "list_type": "a list, as [2, 4]",
    "dict_type": "a mapping, as {kind: ...}",
    "model_type": "a mapping, as {key: value}",
    "too_short": "more entries",
    "too_long": "fewer entries",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "path_type": "a path",
}

# what the loader raises: its own errors, errors of bytes or values (UTF-8, dates), and endless nesting
_NOT_YAML = (yaml.YAMLError, ValueError, RecursionError)


def preset_names() -> list[str]:
    """Return the names of the presets in the package, such as `tiny/meta`."""
    return sorted(name for name, _ in _walk(files("metatokens.presets"), ""))


def preset_purpose(name: str) -> str:
    """Return the first sentence of the comment that begins a preset of the package."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), _read_preset(name).splitlines())
    comment = " ".join(line.removeprefix("#").strip() for line in lines)
    return re.split(r"(?<=[^.]\.) (?=[A-Z`-])", comment, maxsplit=1)[0].rstrip(".")


def _walk(folder: Traversable, prefix: str) -> Iterator[tuple[str, Traversable]]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _walk(entry, f"{prefix}{entry.name}/")
        elif entry.name.endswith(".yaml"):
            yield prefix + entry.name.removesuffix(".yaml"), entry


@overload
def load_preset(preset: str | Path, overrides: Sequence[str] = ()) -> PretrainConfig: ...
@overload
def load_preset(preset: str | Path, overrides: Sequence[str] = (), *, schema: type[Config]) -> Config: ...
def load_preset(
    preset: str | Path, overrides: Sequence[str] = (), *, schema: type[BaseModel] = PretrainConfig
) -> BaseModel:
    """Load a preset by name or path and apply overrides.

    Args:
        preset: a name from `preset_names()` or the path of a YAML file, such as a run folder's config.yaml.
        overrides: alternating `--section.key` and value, or `--section.key=value`.
        schema: the config class of the run; it gives the values that the preset leaves out.

    Raises:
        UsageError: for an unknown preset or key (with the nearest name), or a value that does not fit.
    """
    tree = _merge(schema().model_dump(mode="json"), _load_tree(str(preset), seen=()))
    return _override_tree(tree, overrides, origin=str(preset), schema=schema)


def read_file(path: Path, *, schema: type[Config]) -> Config:
    """Read a YAML file that sets everything its schema has no default for; it may extend another one.

    Raises:
        UsageError: the file is no YAML, or the first value that does not fit.
    """
    return validate(_load_tree(str(path), seen=()), str(path), schema)


def verb_of(preset: str | Path) -> str:
    """Return the verb that runs a preset: pretrain, finetune or graft; empty if its keys are those of all three."""
    keys = _load_tree(str(preset), seen=()).keys()
    return next((verb for verb, own in _KEYS_OF_VERBS.items() if not keys.isdisjoint(own)), "")


def is_finetuning(preset: str | Path) -> bool:
    """Tell whether a preset describes fine-tuning on a recall task."""
    return verb_of(preset) == "finetune"


def check_kind_of_run(preset: str | Path, verb: str) -> None:
    """Refuse a preset of another verb, whose keys would each be refused as unknown.

    Raises:
        UsageError: it has keys of the other kind, and none of the kind that is asked for.
    """
    other = verb_of(preset)
    if other not in ("", verb):
        command = f"graft BASE --preset {preset}" if other == "graft" else f"{other} {preset}"
        raise UsageError(
            f"preset {str(preset)!r}",
            expected=f"one of `metatokens {verb}`",
            found=f"one of `metatokens {other}`",
            remedy=f"write `metatokens {command}`",
        )


def override(config: Config, overrides: Sequence[str], origin: str) -> Config:
    """Return a config with overrides applied, as `load_preset` does to a preset.

    Raises:
        UsageError: for an unknown key (with the nearest name), or a value that does not fit.
    """
    return _override_tree(config.model_dump(mode="json"), overrides, origin=origin, schema=type(config))


def override_fields(config: Config, changes: Mapping[str, Any], origin: str) -> Config:
    """Return a config with a nested mapping of changes applied, as a preset changes the one it extends.

    Raises:
        UsageError: as `override`; the message begins with `origin`.
    """
    return validate(_merge(config.model_dump(mode="json"), changes), origin=origin, schema=type(config))


def _override_tree(tree: dict[str, Any], overrides: Sequence[str], origin: str, schema: type[Config]) -> Config:
    short_names = getattr(schema, "short_names", {})
    written = list(_write_out(parse_overrides(overrides), short_names))
    for path, _ in written:
        close = difflib.get_close_matches(path[0], [*short_names, *schema.model_fields], n=1, cutoff=0.5)
        if len(path) == 1 and path[0] not in schema.model_fields and close and close[0] in short_names:
            key = f"--{path[0]}"
            raise UsageError(key, expected="a key of the schema", found=path[0], remedy=f"did you mean --{close[0]}?")
    # kinds first, wherever they stand: a kind resets the fields of its variant
    for path, value in sorted(written, key=lambda pair: pair[0][-1] != "kind"):
        _set(tree, path, value)
    return validate(tree, origin=origin, schema=schema)


def _write_out(
    overrides: Sequence[tuple[tuple[str, ...], Any]], short_names: Mapping[str, str]
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield overrides with short names, such as --lr, replaced by what they stand for."""
    for path, value in overrides:
        if len(path) == 1 and path[0] in short_names:
            yield from parse_overrides(short_names[path[0]].format(json.dumps(value)).split())
        else:
            yield path, value


def parse_overrides(arguments: Sequence[str]) -> list[tuple[tuple[str, ...], Any]]:
    """Split `--a.b value` and `--a.b=value` arguments into paths and YAML values."""
    pairs = []
    remaining = list(arguments)
    while remaining:
        flag = remaining.pop(0)
        if not flag.startswith("--") or len(flag) < len("--x"):
            raise UsageError(
                f"argument {flag!r}", expected="--section.key value", found=flag, remedy="see the command's -h"
            )
        name, equals, text = flag[2:].partition("=")
        if not equals:
            if not remaining:
                raise UsageError(flag, expected="a value", found="nothing", remedy=f"write `{flag} VALUE`")
            text = remaining.pop(0)
        try:
            value = yaml.load(text, _StrictLoader)
        except _NOT_YAML:
            value = text
        pairs.append((tuple(name.replace("-", "_").split(".")), value))
    return pairs


def validate(tree: dict[str, Any], origin: str, schema: type[Config]) -> Config:
    """Validate a tree of plain values.

    Raises:
        UsageError: the first problem, in one line that begins with `origin`.
    """
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        raise _usage_error(error, origin, schema, tree) from None


def to_yaml(config: BaseModel) -> str:
    """Write a config as YAML; the text is a valid preset that loads to an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of a nested mapping by their dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def digest(config: BaseModel) -> str:
    """Return the SHA-256 of a config's canonical JSON."""
    return json_sha256(config.model_dump(mode="json"))


def differences_from_paper(config: PretrainConfig) -> list[str]:
    """Return a line for each setting that differs from the paper's run with the same position encoding."""
    learned = config.model.position_encoding == "learned"
    paper = load_preset("paper/meta-learned-152m" if learned else "paper/meta-rope-152m").model_dump(mode="json")
    own = config.model_dump(mode="json")
    lines = []
    for section in ("model", "data", "injection", "optimizer", "schedule", "training"):
        for key in sorted((paper[section].keys() | own[section].keys()) - NOT_SCIENCE):
            theirs, ours = paper[section].get(key), own[section].get(key)
            if theirs != ours:
                lines.append(f"{section}.{key}: {json.dumps(ours)}, paper {json.dumps(theirs)}")
    return lines


def _load_tree(preset: str, seen: tuple[str, ...]) -> dict[str, Any]:
    if preset in seen:
        raise UsageError(
            f"preset {preset}",
            expected="no circle of `extends:`",
            found=" -> ".join((*seen, preset)),
            remedy="change its `extends:`",
        )
    try:
        tree = yaml.load(_read_preset(preset), _StrictLoader)
    except UsageError:  # a ValueError, as others of YAML are
        raise
    except (OSError, *_NOT_YAML) as error:
        raise UsageError(f"preset {preset}", expected="YAML", found=str(error), remedy="correct the file") from None
    if not isinstance(tree, dict | None):
        raise UsageError(f"preset {preset}", expected="a mapping", found=type(tree).__name__, remedy="correct the file")
    tree = tree or {}
    parent = tree.pop("extends", None)
    if parent is None:
        return tree
    if not isinstance(parent, str):
        raise UsageError(
            f"preset {preset}: extends",
            expected="a preset's name or path",
            found=repr(parent),
            remedy="correct the file",
        )
    if parent.endswith(YAML_SUFFIXES):
        parent = str(Path(preset).parent / parent)  # relative to the file that names it
    return _merge(_load_tree(parent, (*seen, preset)), tree)


def _read_preset(preset: str) -> str:
    path = Path(preset)
    if path.suffix in YAML_SUFFIXES and path.is_file():
        if path.stat().st_size > MAX_PRESET_BYTES:
            raise UsageError(
                preset,
                expected=f"at most {MAX_PRESET_BYTES} bytes",
                found=str(path.stat().st_size),
                remedy="shorten it",
            )
        remedy = "take another copy; if the change is yours, remove the first line"
        return unseal(path.read_bytes().decode(), preset, remedy=remedy)
    known = dict(_walk(files("metatokens.presets"), ""))
    if preset in known:
        return known[preset].read_text(encoding="utf-8")
    raise UsageError(
        f"preset {preset!r}",
        expected="a .yaml file or a name that `metatokens info --presets` lists",
        found="no such file" if path.suffix in YAML_SUFFIXES else "neither",
        remedy=nearest_name(preset, list(known)) or "see `metatokens info --presets`",
    )


def _merge(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Merge nested mappings; a change of `kind` starts that variant from its defaults."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        same_kind = (
            isinstance(old, dict) and isinstance(value, dict) and value.get("kind", old.get("kind")) == old.get("kind")
        )
        merged[key] = _merge(old, value) if same_kind and isinstance(old, dict) else value
    return merged


def _set(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for key in reversed(path):
        value = {key: value}
    tree.update(_merge(tree, value))


def _usage_error(error: ValidationError, origin: str, schema: type[BaseModel], tree: Mapping[str, Any]) -> UsageError:
    problem = error.errors()[0]
    keys = _keys_of(schema, list(problem["loc"]))
    path = ".".join(keys)
    where = f"{origin}: {path}" if path else origin
    if problem["type"] == "extra_forbidden":
        return UsageError(
            f"{origin}: unknown key {path}",
            expected="a key of the schema",
            found=repr(keys[-1]),
            remedy=_in_place_of(path, keys[-1], schema, tree) or "see the command's -h",
        )
    if problem["type"] == "value_error":
        found = problem["msg"].removeprefix("Value error, ")
        return UsageError(where, expected="settings that agree", found=found, remedy="change one of the keys named")
    if problem["type"] == "union_tag_invalid":
        context = problem["ctx"]
        kind = context["tag"]
        remedy = nearest_name(kind, [tag.strip("' ") for tag in context["expected_tags"].split(",")])
        return UsageError(
            f"{where}.kind", expected=context["expected_tags"], found=repr(kind), remedy=remedy or "pick one"
        )
    remedy = "see the command's -h"
    if problem["type"] == "missing" and isinstance(problem["loc"][-1], int):
        return UsageError(where, expected="more entries", found=repr(problem["input"]), remedy=remedy)
    if problem["type"] == "missing":
        return UsageError(where, expected="a value", found="nothing", remedy=remedy)
    expected = problem["msg"].removeprefix("Input should be ")
    if problem["type"] in _EXPECTED:
        expected = _EXPECTED[problem["type"]]
    return UsageError(where, expected=expected, found=repr(problem["input"]), remedy=remedy)


def _in_place_of(path: str, last: Any, schema: type[BaseModel], tree: Mapping[str, Any]) -> str:
    """Suggest what to write instead of an unknown key."""
    if "." in str(last):
        section, _, name = path.rpartition(".")
        return f"a file nests keys: {section.replace('.', ': {')}: {{{name}: ...}}{'}' * section.count('.')}"
    if path in (short := getattr(schema, "short_names", {})):
        return f"a file has no short names; its key is {short[path].split()[-2].removeprefix('--')}"
    return nearest_key(path, schema, tree)


def _keys_of(model: type[BaseModel], location: list[int | str]) -> list[str]:
    """Return the keys of an error's location without pydantic's additions, such as the tag of a variant."""
    if not location:
        return []
    if isinstance(location[0], int):  # an index into a list
        return _keys_of(model, location[1:])
    name = location[0]
    if name not in model.model_fields:
        return [name]
    for variant in _classes_in(model.model_fields[name].annotation):
        kind = kind_of(variant)
        rest = location[1:]
        if kind is None:
            return [name, *_keys_of(variant, rest)]
        if rest and rest[0] == kind:
            return [name, *_keys_of(variant, rest[1:])]
    return [name]


def _classes_in(annotation: Any) -> list[type[BaseModel]]:
    """Return the config classes of an annotation, those of the entries of a list too."""
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [found for part in getattr(annotation, "__args__", ()) for found in _classes_in(part)]
