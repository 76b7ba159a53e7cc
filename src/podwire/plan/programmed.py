"""On which nodes is a Service programmed? From the nodes' own words (model.acknowledgement)."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from podwire.model.acknowledgement import Acknowledgement
from podwire.model.objects import EndpointSlice, Node, Service
from podwire.plan.services_table import ignored

SILENT = timedelta(minutes=5)
"""A word so old counts no more. Nodes give theirs every minute; the rest is for clocks that differ, and API servers that are
away."""


@dataclass(frozen=True, slots=True)
class Programmed:
    """One Service. `on`, `late`: names of nodes that are ready; `absent`: of those that are not, and did not say so either.
    `at`: the latest word of those that have it. `why`: it is none that nodes serve; empty where it is."""

    on: tuple[str, ...] = ()
    late: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    at: datetime | None = None
    why: str = ""

    @property
    def everywhere(self) -> bool:
        """On every node that is ready."""
        return not self.late and bool(self.on)


def void(
    acks: Mapping[str, Acknowledgement], nodes: Iterable[Node], now: datetime, heard: Collection[str] = ()
) -> dict[str, str]:
    """Nodes whose word counts no more → why, in words. `heard`: those that just gave it, whatever their clocks say."""
    boots = {node.metadata.name: node.status.node_info.boot_id for node in nodes}
    found: dict[str, str] = {}
    for name, ack in acks.items():
        if name not in boots:
            continue
        if ack.boot and boots[name] and ack.boot != boots[name]:
            found[name] = "has not said anything since it was started anew"
        elif name not in heard and ack.at is not None and now - ack.at > SILENT:
            found[name] = f"has not said anything for {int((now - ack.at).total_seconds()) // 60} min"
    return found


def programmed(
    service: Service,
    slices: Iterable[EndpointSlice],
    nodes: Iterable[Node],
    acks: Mapping[str, Acknowledgement],
    unaware: Collection[str] = (),
) -> Programmed:
    """`unaware`: nodes that may still have slices of this Service that are gone."""
    if ignored(service):
        kind = service.spec.type if service.spec.type == "ExternalName" else "headless, or another proxy's"
        return Programmed(why=f"no node programs it: it is {kind}")
    pieces = tuple(slices)
    on: list[str] = []
    late: list[str] = []
    absent: list[str] = []
    times: list[datetime] = []
    for node in sorted(nodes, key=lambda node: node.metadata.name):
        name = node.metadata.name
        ack = acks.get(name)
        if ack is not None and name not in unaware and ack.covers(service, pieces):
            on.append(name)
            if ack.at is not None:
                times.append(ack.at)
        else:
            (late if node.ready else absent).append(name)
    return Programmed(tuple(on), tuple(late), tuple(absent), max(times, default=None))
