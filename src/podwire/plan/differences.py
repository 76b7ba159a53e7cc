"""What a comparison with the kernel found, in a few words for the log: which sets and chains, and whose elements."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

from podwire.model.addr import Family
from podwire.model.nft import (
    AddElements,
    AddTable,
    Batch,
    DelElements,
    ReplaceElements,
    SetRules,
    fields_text,
    packed_length,
)
from podwire.plan.iptables import Restore
from podwire.plan.services_rules import sets_of

_MOST_THINGS, _MOST_OWNERS = 5, 3
_MOST_ELEMENTS = 1000
"""Of one set that are looked at; where so many differ, it matters little whose the others are."""

_PROGRAMS = {Family.IPV4: "iptables", Family.IPV6: "ip6tables"}

Elements = AddElements | ReplaceElements | DelElements


def nft_differences(batch: Batch, owner: Callable[[bytes], str]) -> list[str]:
    """`owner`: whose frontend's key (`services_maps.frontend_key`) it is; empty for nobody's."""
    anew = dict.fromkeys(command.table for command in batch.commands if isinstance(command, AddTable))
    found: dict[str, dict[str, None]] = {f"table {table}": {} for table in anew}
    for command in batch.commands:
        if command.table in anew:
            continue
        if isinstance(command, SetRules):
            found.setdefault(f"chain {command.table} {command.chain}", {})
        elif isinstance(command, Elements):
            owners = found.setdefault(f"set {command.table} {command.set.name}", {})
            owners.update(dict.fromkeys(islice(_owners(command, owner), _MOST_ELEMENTS)))
    return _few(
        [f"{thing} ({', '.join(_few(list(whose), _MOST_OWNERS))})" if whose else thing for thing, whose in found.items()]
    )


def chain_differences(texts: Iterable[Restore]) -> list[str]:
    """Of iptables."""
    return _few(
        [
            f"chain {_PROGRAMS[text.family]} {part.table} {name}"
            for text in texts
            for part in text.tables
            for name in (*part.changed, *part.gone, *(("of the kernel's own",) if part.hooks else ()))
        ]
    )


def _owners(command: Elements, owner: Callable[[bytes], str]) -> Iterator[str]:
    frontend = sets_of(command.table.family).services.key
    if command.set.key[: len(frontend)] != frontend:
        return (command.set.element_text(element) for element in command.elements)
    length = packed_length(frontend)
    keys = (key[:length] for key, _ in command.elements)
    return (owner(key) or f"nobody's {fields_text(frontend, key)}" for key in keys)


def _few(things: Sequence[str], most: int = _MOST_THINGS) -> list[str]:
    more = len(things) - most
    return [*things[:most], f"{more} more"] if more > 0 else list(things)
