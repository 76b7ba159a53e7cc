"""resource.Quantity: "100m", "64Mi", "2", 1e3."""

import math
import re
from fractions import Fraction

_PATTERN = re.compile(r"([+-]?(?:\d+(?:\.\d*)?|\.\d+))([KMGTPE]i|[numkMGTPE]|[eE][+-]?\d+)?")
_DECIMAL = {"n": -9, "u": -6, "m": -3, "": 0, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}
_BINARY = {"Ki": 1, "Mi": 2, "Gi": 3, "Ti": 4, "Pi": 5, "Ei": 6}
_BINARY_NAMES = {0: "", **{power: name for name, power in _BINARY.items()}}
_LARGEST_FIRST = sorted(_DECIMAL.items(), key=lambda item: -item[1])


def parse_quantity(text: str | int | float) -> Fraction:
    """The exact number. Raises ValueError for what is no quantity."""
    match = _PATTERN.fullmatch(str(text))
    if match is None:
        raise ValueError(f"{text!r} is not a quantity such as 100m, 64Mi or 2")
    number, suffix = Fraction(match[1]), match[2] or ""
    if suffix in _BINARY:
        return number * (1 << 10 * _BINARY[suffix])
    exponent = _DECIMAL[suffix] if suffix in _DECIMAL else int(suffix[1:])
    return number * Fraction(f"1e{exponent}")


def canonical(text: str | int | float) -> str:
    """The one way in which Kubernetes writes the quantity: 0.5 → 500m, 2000 → 2k, 1024Mi → 1Gi. Raises ValueError.

    Exponents (1e3) stay as they are. Less than a nano is rounded up.
    """
    number, suffix = parse_quantity(text), re.sub(r"^[+-]?[0-9.]+", "", str(text))
    if suffix[:1] in ("e", "E") and suffix not in _DECIMAL and suffix not in _BINARY:
        return str(text)
    if suffix in _BINARY and number.denominator == 1 and number:
        power = max(p for p in (0, *_BINARY.values()) if number % (1 << 10 * p) == 0)
        return f"{number // (1 << 10 * power)}{_BINARY_NAMES[power]}"
    number = Fraction(math.ceil(number * 10**9), 10**9)
    if not number:
        return "0"
    name, exponent = next((n, e) for n, e in _LARGEST_FIRST if (number / Fraction(f"1e{e}")).denominator == 1)
    return f"{number / Fraction(f'1e{exponent}')}{name}"
