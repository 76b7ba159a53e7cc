"""Cases of Services in which time goes by: what balancers are told that ask for a node's health, which tracked connections are
forgotten, and what a node does after one change and after the next. Files and addresses as in `service_cases`."""

import ipaddress
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from fedsync import syncing
from service_cases import Expectation, cases_with, expectation, facts_of

from podwire.kernel.port import Kernel
from podwire.model.addr import Family, IPAddress
from podwire.model.flow import FlowTuple
from podwire.model.servicetable import NodeFacts

Objects = tuple[dict[str, Any], ...]
"""As `service_cases.feed` takes them."""


class Addresses(NamedTuple):
    """Those of the node's interface, with their prefixes, from then on."""

    texts: tuple[str, ...]


class Listens(NamedTuple):
    """All that health-check node ports listen at."""

    at: frozenset[IPAddress]


class Question(NamedTuple):
    """A balancer's, at a health-check node port of the node's address `at` (empty: its own localhost), and the answer; `status`
    0: nobody listens there."""

    port: int
    status: int
    service: str = ""
    endpoints: int = 0
    healthy: bool = True
    at: str = ""


@dataclass(frozen=True)
class Interview:
    """`asks`: objects and addresses that change, questions, and whether the proxy is well from then on. `config`: the proxy's,
    as YAML; None: it is a node of podwire's own."""

    name: str
    family: Family
    facts: NodeFacts
    config: str | None
    steps: tuple[Objects | Addresses | Listens | Question | bool, ...]


def load_interviews() -> Iterator[Interview]:
    for name, family, item in cases_with("asks"):
        config = json.dumps(item["config"]) if "config" in item else None
        yield Interview(name, family, facts_of(item.get("node", {})), config, tuple(map(_asked, item["asks"])))


def _asked(step: dict[str, Any]) -> Objects | Addresses | Listens | Question | bool:
    if "objects" in step:
        return tuple(step["objects"])
    if "addresses" in step:
        return Addresses(tuple(step["addresses"]))
    if "listens" in step:
        places = ("0.0.0.0", "::") if step["listens"] == "everywhere" else step["listens"]
        return Listens(frozenset(map(ipaddress.ip_address, places)))
    if "proxy" in step:
        return {"well": True, "unwell": False}[step["proxy"]]
    if step.get("closed"):
        return Question(step["port"], 0, at=step.get("at", ""))
    return Question(**step)


@dataclass(frozen=True)
class TrackedFlow:
    """A connection that was made before the change: its first packet, the endpoint that it was led to (None: it was not
    translated), and whether the change makes it be forgotten."""

    sent: Expectation
    endpoint: tuple[str, int] | None
    forgotten: bool

    @property
    def label(self) -> str:
        return f"{self.sent.label} at {self.endpoint}"

    def tuples(self, sport: int) -> tuple[FlowTuple, FlowTuple]:
        """Its two directions, made from that port."""
        packet = self.sent.packet
        target = self.endpoint or (str(packet.dst), packet.dport)
        there = FlowTuple(packet.src, packet.dst, packet.protocol, sport, packet.dport)
        return there, FlowTuple(ipaddress.ip_address(target[0]), packet.src, packet.protocol, target[1], sport)


@dataclass(frozen=True)
class FlowCase:
    """`flows` that were made at the objects of `before`, and `after`, what changed. `unseen`: while no proxy ran, so the next
    one begins with what there is after."""

    name: str
    family: Family
    facts: NodeFacts
    before: Objects
    flows: tuple[TrackedFlow, ...]
    after: Objects
    unseen: bool


def load_flow_cases() -> Iterator[FlowCase]:
    for name, family, item in cases_with("flows"):
        flows = tuple(_flow(flow, family) for flow in item["flows"])
        facts = facts_of(item.get("node", {}))
        yield FlowCase(name, family, facts, tuple(item["before"]), flows, tuple(item["after"]), item.get("unseen", False))


def _flow(item: dict[str, Any], family: Family) -> TrackedFlow:
    address, port = item["at"].split() if "at" in item else ("", 0)
    reaches = [item["at"]] if "at" in item else [" ".join(item["to"].partition("/")[0].split())]
    sent = expectation({"from": item["from"], "to": item["to"], "reaches": reaches}, family)
    return TrackedFlow(sent, (address, int(port)) if address else None, {"forgotten": True, "kept": False}[item["then"]])


class Change(NamedTuple):
    """Objects, what becomes of packets once they are programmed, and the TCP connections that are opened then."""

    objects: Objects
    packets: tuple[Expectation, ...]
    opens: tuple[Expectation, ...]


@dataclass(frozen=True)
class ChangeCase:
    """`changes`, one after the other: what is said of each state holds whatever was there before."""

    name: str
    family: Family
    facts: NodeFacts
    changes: tuple[Change, ...]


def load_change_cases() -> Iterator[ChangeCase]:
    for name, family, item in cases_with("changes"):
        changes = tuple(
            Change(
                tuple(step["objects"]),
                tuple(expectation(packet, family) for packet in step["packets"]),
                tuple(expectation(packet, family) for packet in step.get("opens", ())),
            )
            for step in item["changes"]
        )
        yield ChangeCase(name, family, facts_of(item.get("node", {})), changes)


@asynccontextmanager
async def changed(kernel: Kernel, case: FlowCase, make_flows: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
    """The kernel after the case's change, made by the agent's own code; `make_flows` is called before it."""
    async with syncing(kernel, case.facts, case.before, case.family) as fed:
        await make_flows()
        if not case.unseen:
            await fed.feed(case.after, case.family)
            yield
            return
    async with syncing(kernel, case.facts, present((*case.before, *case.after)), case.family):
        yield


def present(items: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """What there is in the end, of objects that came, changed and went in this order."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for item in items:
        if "gone" in item:
            found.pop(("service", item["gone"]), None)
        elif "gone-pod" in item:
            found.pop(("pod", item["gone-pod"]), None)
        else:
            kind = "service" if "service" in item else "pod"
            found[kind, item[kind]["name"]] = item
    return list(found.values())
