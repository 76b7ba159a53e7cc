"""Documents of any kind, drawn from the field table: well typed, otherwise as odd as they come."""

import base64
from datetime import UTC, datetime
from typing import Any

from hypothesis import strategies as st

from podwire.apiserver.schema import INT_OR_STRING, LISTS, QUANTITY, RAW_JSON, TIMES, api_schema

SCHEMA = api_schema()

TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=6)
MOMENTS = st.datetimes(datetime(1970, 1, 2), datetime(2100, 1, 1)).map(lambda t: t.replace(tzinfo=UTC))
SCALARS: dict[str, st.SearchStrategy[Any]] = {
    "string": TEXT,
    "int32": st.integers(-(2**31), 2**31 - 1),
    "int64": st.integers(-(2**63), 2**63 - 1),
    "bool": st.booleans(),
    "bytes": st.binary(max_size=8).map(lambda b: base64.b64encode(b).decode()),
    QUANTITY: st.sampled_from(["0", "100m", "64Mi", "2"]),
    INT_OR_STRING: st.integers(0, 65535) | st.sampled_from(["http", "25%"]),
    **{name: MOMENTS.map(lambda t: t.strftime("%Y-%m-%dT%H:%M:%SZ")) for name in TIMES if name.endswith(".Time")},
    **{name: MOMENTS.map(lambda t: t.strftime("%Y-%m-%dT%H:%M:%S.%fZ")) for name in TIMES if name.endswith("MicroTime")},
    **{name: st.just({"f:spec": {}}) for name in RAW_JSON},
    **{name: st.lists(TEXT, min_size=1, max_size=2) for name in LISTS},
}


def zero(value: Any) -> bool:
    return not value and not isinstance(value, dict)


@st.composite
def messages(draw: st.DrawFn, message: str, depth: int = 4) -> dict[str, Any]:
    """A document of a message's type with a few of its fields, as JSON would carry it (no zeros that Go leaves out)."""
    fields = list(SCHEMA.fields(message).values())
    obj: dict[str, Any] = {}
    for field in draw(st.lists(st.sampled_from(fields), unique=True, max_size=4)) if fields else []:
        if field.type not in SCALARS and depth == 0:
            continue
        one = SCALARS[field.type] if field.type in SCALARS else messages(field.type, depth - 1)
        if field.mapped:
            obj[field.name] = draw(st.dictionaries(TEXT, one, min_size=1, max_size=2))
        elif field.repeated:
            obj[field.name] = draw(st.lists(one, min_size=1, max_size=2))
        else:
            value = draw(one)
            if field.pointer or field.always or not zero(value):
                obj[field.name] = value
    return obj
