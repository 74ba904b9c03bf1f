"""The base of the sections of a recipe: strict checking, and the types of their fields."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from ..dtypes import parse_dtype
from ..errors import ConfigError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

Positive = Annotated[int, Field(ge=1, lt=2**63)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
PositiveReal = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def _short_name(value: Any) -> Any:
    """Return the short name of a number format. Other values are returned unchanged, for a later check."""
    try:
        return parse_dtype(value)
    except (ConfigError, AttributeError):
        return value


def _in_home(path: str) -> str:
    if "\0" in path:
        raise impossible("", f"{path!r} cannot be a path: it has a NUL character")
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise impossible("", f"{path}: there is no such user; write ./{path} for a name that begins with ~")
    return expanded


UserPath = Annotated[str, Field(min_length=1), AfterValidator(_in_home)]
"""A path in which ``~`` is the home folder."""

ComputeDtype = Annotated[Literal["fp32", "bf16"], BeforeValidator(_short_name)]
"""The dtype of matmuls. torch's long names are accepted too."""


class Section(BaseModel):
    """A checked record without unknown keys, which cannot change."""

    # pydantic refuses a path that is not UTF-8, which YAML and JSON cannot hold, only if texts have a limit
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, str_max_length=1 << 20)


def complaint(detail: ErrorDetails) -> str:
    """Return the text of one of pydantic's complaints about a value."""
    if detail["type"] == "string_unicode":
        return "is not UTF-8, so no recipe can hold it; rename the file or folder"
    return detail["msg"][0].lower() + detail["msg"][1:]


def impossible(field: str, message: str) -> PydanticCustomError:
    """Return the error for contradicting fields, with the ``field`` that the user should look at."""
    return PydanticCustomError("impossible", "{reason}", {"field": field, "reason": message})
