"""The base of every config class."""

from types import NoneType
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, model_validator


class Frozen(BaseModel):
    """Base of every config class: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _read_off(cls, values: Any) -> Any:
        """Read `off`, which is False in YAML, as None where a field may be off."""
        if not isinstance(values, dict):
            return values
        optional = {name for name, field in cls.model_fields.items() if NoneType in get_args(field.annotation)}
        return {key: None if value is False and key in optional else value for key, value in values.items()}
