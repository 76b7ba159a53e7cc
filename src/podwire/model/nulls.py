"""Documents of programs in Go, which write fields that are not set as null."""

from typing import Any


def without_nulls(value: Any) -> Any:
    """A JSON value without the fields that are null, at any depth."""
    match value:
        case dict():
            return {key: without_nulls(item) for key, item in value.items() if item is not None}
        case list():
            return [without_nulls(item) for item in value]
        case _:
            return value
