"""What people write into YAML files and parameters, checked by its type: an error names field, value and remedy."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

T = TypeVar("T")


def _distinct(values: list) -> list:
    texts = [json.dumps(value, sort_keys=True) for value in values]
    twice = [value for value, text in zip(values, texts, strict=True) if texts.count(text) > 1]
    if twice:
        raise ValueError(f"holds {twice[0]!r} twice")
    return values


Some = Annotated[list[T], Field(min_length=1), AfterValidator(_distinct)]  # one value or more, each once
Count = Annotated[int, Field(ge=1)]


def read(path: Path, kind: type[T]) -> T:
    """The value of a YAML 1.2 file as a `kind`: ``010`` is ten, ``1e-3`` a number, ``yes`` a word, a key stands once.

    Raises ValueError for what is no YAML or no `kind`, OSError for a file that cannot be read.
    """
    try:
        value = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except MarkedYAMLError as error:
        raise ValueError(f"{path}, line {error.problem_mark.line + 1}: {error.problem}") from None
    except (YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    return checked(value, kind, f"{path}: ")


def checked(value: object, kind: type[T], where: str = "", name: str = "it") -> T:
    """`value` as a `kind`: strictly, ``"0.9"`` is no number and ``1.0`` no whole number.

    Raises ValueError: `where`, then the field, or `name` for the value itself, and what it must be.
    """
    try:
        # By way of JSON, where an object stands for a dataclass.
        return TypeAdapter(kind).validate_json(json.dumps(value, default=str), strict=True, extra="forbid")
    except ValidationError as error:
        raise ValueError(where + "; ".join(_told(each, name) for each in error.errors())) from None


def json_mapping(text: str) -> dict[str, Any]:
    """A JSON object, as an argument of a command line. Raises argparse.ArgumentTypeError."""
    try:
        return checked(json.loads(text), dict[str, Any])
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not understood: {error}") from None


MUST = {
    "list_type": "must be a list, such as [a, b]",
    "dict_type": "must be a mapping, such as {name: value}",
    "dataclass_type": "must be a mapping, such as {name: value}",
    "float_type": "must be a number",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "bool_type": "must be true or false",
    "string_type": 'must be a text, such as "a"',
}


def _told(error: dict[str, Any], name: str) -> str:
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"]).lstrip(".")
    match error["type"]:
        case "missing":
            told = "is missing"
        case "unexpected_keyword_argument" | "extra_forbidden":
            told = "is unknown"
        case "value_error":
            return f"{field or name}: {error['ctx']['error']}"
        case "too_short":
            told = "is empty"
        case kind if error["input"] is None:
            told = f"is empty: it {MUST.get(kind, error['msg'])}"
        case kind:
            told = f"{MUST.get(kind, error['msg'])}, not {error['input']!r}"
    return f"{field or name} {told}"
