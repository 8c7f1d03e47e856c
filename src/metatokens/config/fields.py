"""The fields of a config class as people look for them: documentation, present values, the nearest name.

A field of a variant of a union, such as `training.duration.tokens`, exists only under its kind. `describe_fields` lists
the fields of all kinds; the help shows those of the present kinds first and says of the others what they need.
"""

import difflib
import json
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

HELP_WIDTH = 80


class FieldOfConfig(NamedTuple):
    """A field that `--path VALUE` sets."""

    path: str
    """With dots; it ends with one if the field is a section of its own."""
    default: str
    """As JSON, or "required"."""
    documentation: str
    kinds: tuple[tuple[str, str], ...] = ()
    """The keys and the values of the kinds that it exists under."""

    def missing_kinds(self, tree: Mapping[str, Any]) -> list[tuple[str, str]]:
        """Return the kinds that it needs and that a tree of values does not have."""
        return [(path, kind) for path, kind in self.kinds if value_at(tree, path, default=kind) != kind]


def describe_fields(
    model: type[BaseModel], prefix: str = "", kinds: tuple[tuple[str, str], ...] = ()
) -> Iterator[FieldOfConfig]:
    """Yield every field of a config class, including those of all variants of a union."""
    for name, field in model.model_fields.items():
        path = f"{prefix}{name}"
        variants = variants_of(field)
        if not variants:
            yield FieldOfConfig(path, _default(field), _documentation(field), kinds)
            continue
        yield FieldOfConfig(path + ".", "", "", kinds)
        for variant in variants:
            kind = kind_of(variant)
            yield from describe_fields(variant, path + ".", (*kinds, *([(f"{path}.kind", kind)] if kind else [])))


def variants_of(field: FieldInfo) -> list[type[BaseModel]]:
    """Return the config classes that a field may hold; none for a value or a list."""
    return _config_classes(field.annotation)


def kind_of(variant: type[BaseModel]) -> str | None:
    """Return the name of a variant of a union; None for a class that stands alone."""
    field = variant.model_fields.get("kind")
    return None if field is None else str(field.default)


def value_at(tree: Mapping[str, Any], path: str, *, default: Any = None) -> Any:
    """Return the value of a dotted path in nested mappings."""
    value: Any = tree
    for key in path.split("."):
        if not isinstance(value, Mapping) or key not in value:
            return default
        value = value[key]
    return value


def nearest_key(path: str, schema: type[BaseModel], tree: Mapping[str, Any]) -> str:
    """Suggest a key in place of an unknown one: in another variant, in another section, or spelt alike.

    If the suggested key needs another kind than the tree has, the text says which.
    """
    fields = [field for field in describe_fields(schema) if not field.path.endswith(".")]
    section, _, name = path.rpartition(".")
    same = [field for field in fields if field.path == path]
    if same:
        needed = " or ".join(sorted({f"--{key} {kind}" for field in same for key, kind in field.missing_kinds(tree)}))
        return f"it needs {needed}"
    for field in fields:
        if field.path.rpartition(".")[2] == name:
            return _ask(field, tree)
    depth = path.count(".") + 1
    siblings = {
        ".".join(f.path.split(".")[:depth]): f for f in reversed(fields) if f".{f.path}".startswith(f".{section}")
    }
    # compares last names alone, because all keys of a section share the rest
    for found in (siblings, {field.path: field for field in fields}):
        names = {key.rpartition(".")[2]: key for key in reversed(sorted(found) if found is siblings else list(found))}
        short = {"".join(word[0] for word in other.split("_")): other for other in names}
        nearest = short.get(name) if len(name) > 1 else None
        nearest = nearest or next(iter(difflib.get_close_matches(name, names, n=1, cutoff=0.5)), None)
        if nearest:
            return _ask(found[names[nearest]], tree, names[nearest])
    return ""


def _ask(field: FieldOfConfig, tree: Mapping[str, Any], path: str | None = None) -> str:
    path = path or field.path
    missing = field.missing_kinds(tree) if path == field.path else []
    needs = "".join(f" It needs --{key} {kind}" for key, kind in missing)
    return f"did you mean {path!r}?{needs}"


def format_fields(schema: type[BaseModel], tree: Mapping[str, Any]) -> str:
    """Write the help of a config class with the values of a tree, a part for each section.

    Args:
        schema: the config class.
        tree: nested values, such as those of a preset; the class's defaults stand in for what it leaves out.
    """
    short = getattr(schema, "short_names", {})
    parts = []
    if short:
        lines = [_entry(f"--{name} VALUE", f"short for {text.replace('{}', 'VALUE')}") for name, text in short.items()]
        parts.append("\n".join(["short names:", *lines]))
    alone = [
        _entry(_label(name, tree.get(name), field), _documentation(field))
        for name, field in schema.model_fields.items()
        if not variants_of(field)
    ]
    parts += ["\n".join(["of the whole:", *alone])] if alone else []
    for name, field in schema.model_fields.items():
        if variants_of(field):
            parts.append("\n".join([f"{name}:", *_section_lines(name, field, tree.get(name))]))
    return "\n\n".join(parts)


def _section_lines(path: str, field: FieldInfo, tree: Any) -> Iterator[str]:
    """Yield the entries of a section; of a union its kinds, the fields of the present one, then those of the others."""
    variants = variants_of(field)
    present, others = _present_variant(field, tree), []
    if kind_of(present) is not None:
        kinds = "; ".join(f"{kind_of(variant)}: {_first_sentence(variant)}" for variant in variants)
        yield _entry(f"--{path}.kind [{kind_of(present)}]", kinds)
        others = [variant for variant in variants if variant is not present]
    values = tree if isinstance(tree, Mapping) else {}
    shown = {"kind"}
    for variant in (present, *others):
        for name, inner in variant.model_fields.items():
            if name in shown:
                continue
            shown.add(name)
            value = values.get(name) if variant is present else None
            having = [str(kind_of(other)) for other in others if name in other.model_fields]
            note = "" if variant is present else f" (kind {' or '.join(having)})"
            if variants_of(inner):
                yield from _section_lines(f"{path}.{name}", inner, value)
            else:
                yield _entry(_label(f"{path}.{name}", value, inner, given=name in values) + note, _documentation(inner))


def _present_variant(field: FieldInfo, tree: Any) -> type[BaseModel]:
    """Return the variant that the values choose, or that of the field's default."""
    variants = variants_of(field)
    kind = tree.get("kind") if isinstance(tree, Mapping) else None
    chosen = type(field.default) if kind is None else None
    return next((v for v in variants if v is chosen or (kind is not None and kind_of(v) == kind)), variants[0])


def _label(path: str, value: Any, field: FieldInfo, *, given: bool = False) -> str:
    shown = json.dumps(value, default=str) if given or value is not None else _default(field)
    shown = "off" if shown == "null" else shown.strip('"')
    return f"--{path} [{shown}]"


def _entry(label: str, text: str) -> str:
    """Write a label and, indented below it, its text."""
    wrap = textwrap.TextWrapper(HELP_WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6, break_long_words=False)
    label = textwrap.fill(label, HELP_WIDTH, initial_indent="  ", subsequent_indent=" " * 4, break_on_hyphens=False)
    return "\n".join([label, *wrap.wrap(text)])


def _first_sentence(model: type[BaseModel]) -> str:
    return " ".join((model.__doc__ or "").split("\n\n", maxsplit=1)[0].split()).rstrip(".")


def _default(field: FieldInfo) -> str:
    return "required" if field.is_required() else json.dumps(_plain(field.default), default=str)


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _documentation(field: FieldInfo) -> str:
    return " ".join((field.description or "").split())


def _config_classes(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, BaseModel) else []
    if get_origin(annotation) in (tuple, list, dict):
        return []
    return [found for part in getattr(annotation, "__args__", ()) for found in _config_classes(part)]
