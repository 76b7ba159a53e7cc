"""resource.Quantity: read exactly, written canonically."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from podwire.apiserver.quantities import canonical, parse_quantity


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("100m", Fraction(1, 10)),
        ("64Mi", 64 * 2**20),
        ("2", 2),
        ("0.5", Fraction(1, 2)),
        ("1e3", 1000),
        ("-1k", -1000),
        ("5n", Fraction(5, 10**9)),
    ],
)
def test_reading(text: str, number: Fraction | int) -> None:
    assert parse_quantity(text) == number


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("0.5", "500m"),
        ("1000m", "1"),
        ("1500m", "1500m"),
        ("2000", "2k"),
        ("1024", "1024"),
        ("1024Mi", "1Gi"),
        ("0.5Gi", "512Mi"),
        ("1.5Ki", "1536"),
        ("0Mi", "0"),
        ("110", "110"),
        ("1e3", "1e3"),
        ("1E", "1E"),
        ("-0.25", "-250m"),
        ("0.0000000001", "1n"),
    ],
)
def test_writing(text: str, written: str) -> None:
    assert canonical(text) == written


@pytest.mark.parametrize("text", ["", "x", "1Q", "1 Mi", "1..2", "--1"])
def test_what_is_no_quantity(text: str) -> None:
    with pytest.raises(ValueError, match="is not a quantity"):
        parse_quantity(text)


@given(st.from_regex(r"[0-9]{1,6}(\.[0-9]{1,3})?([KMGT]i|[mkMGT])?", fullmatch=True))
def test_the_canonical_form_is_the_same_number_and_stays(text: str) -> None:
    written = canonical(text)
    assert parse_quantity(written) == parse_quantity(text)
    assert canonical(written) == written
