"""The base of every config class."""

from pathlib import Path
from types import NoneType
from typing import Annotated, Any, TypeAlias, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, model_validator


def _expand_home(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError as error:  # there is no such user
        raise ValueError(f"{path}: {error}") from None


UserPath: TypeAlias = Annotated[Path, AfterValidator(_expand_home)]
"""A path that may begin with ~, since a shell does not expand it in --data.path=~/tokens."""


class Frozen(BaseModel):
    """Base of every config class: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    def __init__(self, /, *values: Any, **fields: Any) -> None:
        """Take the fields by name; a variant of a union takes all but its `kind` by position too, in their order.

        Raises:
            TypeError: More values than fields, or a field given twice.
            ValueError: A field is missing, unknown or wrong; the message is one sentence.
        """
        names = (
            [name for name in type(self).model_fields if name != "kind"] if "kind" in type(self).model_fields else []
        )
        if len(values) > len(names):
            raise TypeError(f"{type(self).__name__} takes {len(names)} values by position, not {len(values)}")
        for name, value in zip(names, values, strict=False):
            if name in fields:
                raise TypeError(f"{type(self).__name__} got {name} twice")
            fields[name] = value
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise ValueError(_in_one_sentence(type(self), error)) from None

    # only a call by hand comes here: validation of a tree reports every problem with its place
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @model_validator(mode="before")
    @classmethod
    def _read_off(cls, values: Any) -> Any:
        """Read `off`, which is False in YAML, as None where a field may be off."""
        if not isinstance(values, dict):
            return values
        optional = {name for name, field in cls.model_fields.items() if NoneType in get_args(field.annotation)}
        return {key: None if value is False and key in optional else value for key, value in values.items()}


def _in_one_sentence(config: type[BaseModel], error: ValidationError) -> str:
    problem = error.errors()[0]
    where = ".".join([config.__name__, *map(str, problem["loc"])])
    if problem["type"] == "extra_forbidden":
        return f"{config.__name__} has no {problem['loc'][-1]}; it has {', '.join(config.model_fields)}"
    if problem["type"] == "missing":
        return f"{where} is missing"
    if problem["type"] == "value_error":  # of our own, which names the value
        return f"{where}: {problem['msg'].removeprefix('Value error, ')}"
    message = problem["msg"].removeprefix("Input ")
    return f"{where} {message}, not {problem['input']!r}"
