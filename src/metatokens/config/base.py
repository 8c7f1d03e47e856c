"""The base of every config class."""

from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, ClassVar, TypeAlias, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, model_validator


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
    short_names: ClassVar[Mapping[str, str]] = {}
    """Short names of overrides, such as `--lr`, and the overrides that each stands for, with {} for the value."""

    @model_validator(mode="before")
    @classmethod
    def _read_off(cls, values: Any) -> Any:
        """Read `off`, which is False in YAML, as None where a field may be off."""
        if not isinstance(values, dict):
            return values
        optional = {name for name, field in cls.model_fields.items() if NoneType in get_args(field.annotation)}
        return {key: None if value is False and key in optional else value for key, value in values.items()}
