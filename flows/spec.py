"""Files of thresholds, typed: a gate's and a canary's. A typo is refused with the nearest valid name."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from infra.errors import ConfigError
from infra.settings import refuse_switch
from infra.yaml_file import read_yaml


class Section(BaseModel):
    """A part of a file: no unknown field, never changed; a number is finite, and no `yes` or `on`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _is_no_switch(cls, value: Any, info: ValidationInfo) -> Any:
        return refuse_switch(value, cls.model_fields[str(info.field_name)].annotation)


Spec = TypeVar("Spec", bound=Section)


def read_spec(path: Path, model: type[Spec], default: Path) -> Spec:
    """Read and validate a gate file.

    Args:
        path: the file.
        model: what it must hold.
        default: a valid file of this kind, to start from.

    Raises:
        ConfigError: missing, not YAML, or a field is unknown, missing or out of range; names the field and, for a
            typo, the nearest valid name.
    """
    raw = read_yaml(path, "gate", f"start from a copy of {default}")
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        # An unknown field before a missing one: where both are, the one is the other, mistyped.
        first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
        where = ".".join(str(part) for part in first["loc"]) or "the document"
        fix = f"correct {where!r} in {path}"
        if first["type"] == "extra_forbidden":
            known = _fields_at(model, first["loc"][:-1])
            near = difflib.get_close_matches(str(first["loc"][-1]), known, 1, 0)[0]
            fix = f"did you mean {near!r}? known here: {', '.join(known)}"
        raise ConfigError(f"gate {path}: {where}: {first['msg']}", fix) from error


def _fields_at(model: Any, location: Sequence[int | str]) -> list[str]:
    for part in location:
        annotation = model.model_fields[part].annotation
        model = next((m for m in get_args(annotation) if isinstance(m, type) and issubclass(m, Section)), annotation)
    return list(model.model_fields)
