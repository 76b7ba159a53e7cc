"""Label and field selectors as they stand in a query string."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from podwire.apiserver.status import StatusError, bad_request

_TOKEN = re.compile(r"\s*(?:(?P<op>==|=|!=|!|\(|\)|,|<|>)|(?P<word>[^\s=!(),<>]+))")
_SIGNS = frozenset({"=", "==", "!=", "!", "(", ")", ",", "<", ">"})


@dataclass(frozen=True, slots=True)
class Term:
    """One requirement: `key` `operator` `values`; operators: in, notin, exists, !exists, gt, lt."""

    key: str
    operator: str
    values: frozenset[str] = frozenset()

    def matches(self, labels: Mapping[str, str]) -> bool:
        value = labels.get(self.key)
        match self.operator:
            case "in":
                return value is not None and value in self.values
            case "notin":
                return value is None or value not in self.values
            case "exists":
                return value is not None
            case "!exists":
                return value is None
            case _:
                return value is not None and _compare(value, self.operator, next(iter(self.values)))


@dataclass(frozen=True, slots=True)
class Selector:
    """Terms that must all hold, on labels or on field values. An empty one matches everything."""

    terms: tuple[Term, ...] = ()

    def matches(self, values: Mapping[str, str]) -> bool:
        return all(term.matches(values) for term in self.terms)

    def required_value(self, key: str) -> str | None:
        """The one value that `key` must have, where the selector says so."""
        for term in self.terms:
            if term.key == key and term.operator == "in" and len(term.values) == 1:
                return next(iter(term.values))
        return None


EVERYTHING = Selector()


def parse_labels(text: str) -> Selector:
    """`a=b,c!=d,e in (f,g),h notin (i),j,!k,n>1`. Raises StatusError 400."""
    tokens = _tokens(text)
    terms: list[Term] = []
    position = 0
    while position < len(tokens):
        term, position = _term(tokens, position, text)
        terms.append(term)
        if position < len(tokens):
            if tokens[position] != "," or position + 1 == len(tokens):
                raise _bad(text, f"found '{tokens[position]}', expected ',' and another requirement")
            position += 1
    return Selector(tuple(terms))


def parse_fields(text: str, supported: Mapping[str, str]) -> Selector:
    """`metadata.name=x,spec.nodeName!=y`. `supported` holds the field paths that can be selected on. Raises StatusError 400."""
    terms: list[Term] = []
    for part in filter(None, text.split(",")):
        match = re.fullmatch(r"\s*([^=!\s]+)\s*(==|=|!=)\s*(.*?)\s*", part)
        if match is None:
            raise bad_request(f"invalid field selector {text!r}: {part!r} is not a comparison with =, == or !=")
        key, operator, value = match.groups()
        if key not in supported:
            raise bad_request(f'Unable to find "{key}" that matches the field selector: field label not supported: {key}')
        terms.append(Term(key, "notin" if operator == "!=" else "in", frozenset([value])))
    return Selector(tuple(terms))


def _tokens(text: str) -> list[str]:
    tokens: list[str] = []
    position, end = 0, len(text.rstrip())
    while position < end:
        match = _TOKEN.match(text, position)
        if match is None:
            raise _bad(text, f"cannot be read from {text[position:]!r}")
        tokens.append(match.group("op") or match.group("word"))
        position = match.end()
    return tokens


def _term(tokens: list[str], position: int, text: str) -> tuple[Term, int]:
    if tokens[position] == "!":
        if position + 1 >= len(tokens):
            raise _bad(text, "found '', expected a label key")
        if tokens[position + 1] in _SIGNS:
            raise _bad(text, f"found '{tokens[position + 1]}', expected a label key")
        return Term(tokens[position + 1], "!exists"), position + 2
    key = tokens[position]
    if key in _SIGNS:
        raise _bad(text, f"found '{key}', expected a label key")
    operator = tokens[position + 1] if position + 1 < len(tokens) else ","
    match operator:
        case ",":
            return Term(key, "exists"), position + 1
        case "=" | "==" | "!=" | ">" | "<":
            value, position = _value(tokens, position + 2, text)
            name = {"!=": "notin", ">": "gt", "<": "lt"}.get(operator, "in")
            return Term(key, name, frozenset([value])), position
        case "in" | "notin":
            values, position = _set(tokens, position + 2, text)
            return Term(key, operator, values), position
        case _:
            raise _bad(text, f"found '{operator}', expected: in, notin, =, ==, !=, gt, lt")


def _value(tokens: list[str], position: int, text: str) -> tuple[str, int]:
    if position >= len(tokens) or tokens[position] == ",":
        return "", position
    if tokens[position] in _SIGNS:
        raise _bad(text, f"found '{tokens[position]}', expected a value")
    return tokens[position], position + 1


def _set(tokens: list[str], position: int, text: str) -> tuple[frozenset[str], int]:
    if position >= len(tokens) or tokens[position] != "(":
        raise _bad(text, "expected '(' after in or notin")
    values: list[str] = [""]
    for index in range(position + 1, len(tokens)):
        match tokens[index]:
            case ")":
                return frozenset(values), index + 1
            case ",":
                values.append("")
            case word:
                values[-1] = word
    raise _bad(text, "expected ')' at the end of the values")


def _compare(value: str, operator: str, bound: str) -> bool:
    try:
        return int(value) > int(bound) if operator == "gt" else int(value) < int(bound)
    except ValueError:
        return False


def _bad(text: str, why: str) -> StatusError:
    return bad_request(f"unable to parse requirement: selector {text!r}: {why}")
