"""What can be done to a lab on purpose, as values, and the rules in the nodes' namespaces that do it. Pure.

A cut and a loss are nftables rules where packets arrive, in a table of their own; they match the frames' addresses, so they
are faults of the cable and do not care whose addresses are in the packets. Delay needs the kernel's netem queue
(`podwire.lab.netem`).
"""

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from podwire.lab.topology import Place
from podwire.model.addr import Family
from podwire.model.errors import InvalidInput
from podwire.model.nft import (
    AddChain,
    AddElements,
    AddSet,
    AddTable,
    BaseHook,
    Batch,
    Chain,
    Command,
    DelTable,
    FieldType,
    Hook,
    NftSet,
    Rule,
    SetRules,
    TableRef,
)
from podwire.model.nftexpr import DROP, Cmp, CmpOp, Counter, Immediate, Lookup, Numgen, Payload, PayloadBase
from podwire.plan.nftexprs import Expressions, host_u32

TABLE = "podwire-fault"
_BEFORE_CONNTRACK = -450
_PER_MILLE = 1000
_LOST = NftSet("lost", (FieldType.INDEX,))


class FaultKind(enum.StrEnum):
    """`.value` is the command's name."""

    PARTITION = "partition"
    DROP = "drop"
    DELAY = "delay"
    STOP = "stop"


@dataclass(frozen=True, slots=True)
class Fault:
    """One that lasts until it is healed. `places`: whom it concerns; `others`: from whom they are cut off (PARTITION; empty:
    from everybody else). `amount`: percent of packets (DROP), milliseconds (DELAY)."""

    kind: FaultKind
    places: tuple[str, ...]
    others: tuple[str, ...] = ()
    amount: float = 0.0

    def __str__(self) -> str:
        names = ", ".join(self.places)
        match self.kind:
            case FaultKind.PARTITION:
                return f"{names} cut off from {', '.join(self.others) or 'everybody else'}"
            case FaultKind.DROP:
                return f"{self.amount:g} % of the packets to {names} lost"
            case FaultKind.DELAY:
                return f"packets to and from {names} delayed by {self.amount:g} ms"
            case FaultKind.STOP:
                return f"{names} stopped"

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind.value, "places": list(self.places), "others": list(self.others), "amount": self.amount}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        """Raises InvalidInput."""
        try:
            fault = cls(
                FaultKind(document["kind"]),
                tuple(dict.fromkeys(map(str, document["places"]))),
                tuple(dict.fromkeys(map(str, document.get("others", ())))),
                float(document.get("amount", 0)),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidInput(f"this is no fault: {error}; kinds are {', '.join(FaultKind)}") from error
        if not fault.places:
            raise InvalidInput(f"{fault.kind}: say whom it concerns, e.g. node-1")
        if both := sorted({*fault.places} & {*fault.others}):
            raise InvalidInput(f"{', '.join(both)} cannot be cut off from itself: name places on one side only")
        if fault.kind is FaultKind.DROP and not 0 < fault.amount <= 100:
            raise InvalidInput(f"{fault.amount:g} % of all packets cannot be lost: give more than 0, at most 100")
        if fault.kind is FaultKind.DELAY and not 0 < fault.amount <= 60_000:
            raise InvalidInput(f"a delay of {fault.amount:g} ms cannot be had: give more than 0, at most 60000")
        return fault


def cut_off(place: str, faults: Iterable[Fault], everybody: Iterable[str]) -> frozenset[str]:
    """The places from which `place` may receive nothing."""
    known = set(everybody)
    found: set[str] = set()
    for fault in faults:
        if fault.kind is not FaultKind.PARTITION:
            continue
        inside = set(fault.places)
        outside = set(fault.others) or known - inside
        if place in inside:
            found |= outside
        if place in outside:
            found |= inside
    return frozenset(found - {place})


def amount(kind: FaultKind, place: str, faults: Iterable[Fault]) -> float:
    """The largest loss or delay that a place has to bear; 0: none."""
    return max((fault.amount for fault in faults if fault.kind is kind and place in fault.places), default=0.0)


def plan_rules(place: Place, cut: Iterable[Place], loss: float) -> Batch:
    """Bring the fault rules of `place` to this: nothing from the places in `cut`, `loss` percent of the rest lost."""
    commands: list[Command] = []
    senders = sorted(cut, key=lambda other: other.name)
    for family in Family:
        table = TableRef(family, TABLE)
        commands += [AddTable(table), DelTable(table)]  # whatever it was: gone
        if not senders and not loss:
            continue
        chain = Chain("arriving", BaseHook("filter", Hook.PREROUTING, _BEFORE_CONNTRACK))
        arriving = _frame(0, place.mac)
        rules = [
            Rule((*arriving, *_frame(6, other.mac), Counter(), Immediate(DROP)), f"cut off from {other.name}")
            for other in senders
        ]
        commands += [AddTable(table), AddChain(table, chain)]
        if loss:
            lost = round(loss * _PER_MILLE / 100)
            commands += [AddSet(table, _LOST), AddElements(table, _LOST, tuple((host_u32(n), None) for n in range(lost)))]
            dice = (Numgen(0, _PER_MILLE), Lookup(_LOST.name, 0), Counter(), Immediate(DROP))
            rules.append(Rule((*arriving, *dice), f"{loss:g} % are lost"))
        commands.append(SetRules(table, chain.name, tuple(rules)))
    return Batch(tuple(commands))


def _frame(offset: int, mac: str) -> Expressions:
    """`ether daddr` (offset 0) or `ether saddr` (6)."""
    return Payload(PayloadBase.LINK, offset, 6, 0), Cmp(CmpOp.EQ, 0, bytes.fromhex(mac.replace(":", "")))
