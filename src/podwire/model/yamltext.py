"""YAML (and so JSON) that a person wrote, and what is wrong with it in one line."""

from typing import Any

import yaml

from podwire.model.errors import InvalidInput

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def parse_yaml(text: str | bytes, source: str) -> list[Any]:
    """The documents of a text (bytes: UTF-8, or UTF-16 with its mark), empty ones as None.

    Raises InvalidInput that names `source`, line and column."""
    try:
        return list(yaml.load_all(text, Loader=_LOADER))
    except (yaml.YAMLError, ValueError) as error:  # a date that there is not is a ValueError
        raise InvalidInput(f"{source}: is not YAML ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None and error.problem:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return " ".join(str(error).split())
