"""On which nodes is a Service programmed? From the nodes' own words (model.acknowledgement)."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime

from podwire.model.acknowledgement import Acknowledgement
from podwire.model.objects import EndpointSlice, Node, Service
from podwire.plan.services_table import ignored


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
