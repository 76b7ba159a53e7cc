"""Selectors as text, against their meaning."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from podwire.apiserver.selectors import Selector, Term, parse_fields, parse_labels
from podwire.apiserver.status import StatusError

KEYS = st.sampled_from(["a", "b", "app.kubernetes.io/name", "in", "notin"])
VALUES = st.sampled_from(["", "1", "7", "x", "x-y.z_0"])
LABELS = st.dictionaries(KEYS, VALUES)


@given(key=KEYS, value=VALUES, labels=LABELS)
def test_equality_is_what_it_says(key: str, value: str, labels: dict[str, str]) -> None:
    assert parse_labels(f"{key}={value}").matches(labels) == (labels.get(key) == value)
    assert parse_labels(f"{key} == {value}").matches(labels) == (labels.get(key) == value)
    assert parse_labels(f"{key}!={value}").matches(labels) == (labels.get(key) != value)


@given(key=KEYS, values=st.lists(VALUES, min_size=1, max_size=3), labels=LABELS)
def test_sets_are_what_they_say(key: str, values: list[str], labels: dict[str, str]) -> None:
    inside = f"{key} in ({', '.join(values)})"
    assert parse_labels(inside).matches(labels) == (key in labels and labels[key] in values)
    outside = f"{key} notin ({','.join(values)})"
    assert parse_labels(outside).matches(labels) == (labels.get(key) not in values)
    assert parse_labels(key).matches(labels) == (key in labels)
    assert parse_labels("!" + key).matches(labels) == (key not in labels)


@given(labels=LABELS, bound=st.integers(-3, 10))
def test_numbers_compare(labels: dict[str, str], bound: int) -> None:
    value = labels.get("a", "")
    assert parse_labels(f"a>{bound}").matches(labels) == (value.isdigit() and int(value) > bound)
    assert parse_labels(f"a<{bound}").matches(labels) == (value.isdigit() and int(value) < bound)


@given(text=st.text(alphabet="ab=!,() <>in", max_size=12))
def test_any_text_is_read_or_refused(text: str) -> None:
    code = 0
    try:
        parse_labels(text).matches({"a": "b"})
    except StatusError as error:
        code = error.code
    assert code in (0, 400)


@pytest.mark.parametrize(
    "text", ["a,", "=b", "a in b", "a in (b", "a b", "!", "!!a", "a in (b) c", "(a)", ",a", "a===", "a=!b", "!=", "a in b=(c)"]
)
def test_nonsense_is_refused(text: str) -> None:
    with pytest.raises(StatusError, match="unable to parse requirement"):
        parse_labels(text)


def test_all_terms_must_hold() -> None:
    selector = parse_labels("a=1,b in (x,y),!c")
    assert selector.matches({"a": "1", "b": "y"})
    assert not selector.matches({"a": "1", "b": "y", "c": ""})
    assert selector.required_value("a") == "1"
    assert selector.required_value("b") is None


def test_fields() -> None:
    supported = {"metadata.name": "", "spec.clusterIP": ""}
    selector = parse_fields("metadata.name=a,spec.clusterIP!=None", supported)
    assert selector == Selector(
        (Term("metadata.name", "in", frozenset(["a"])), Term("spec.clusterIP", "notin", frozenset(["None"])))
    )
    assert parse_fields("", supported) == Selector()
    with pytest.raises(StatusError, match="field label not supported"):
        parse_fields("status.x=1", supported)
    with pytest.raises(StatusError, match="is not a comparison"):
        parse_fields("metadata.name", supported)
