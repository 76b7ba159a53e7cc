"""What others may know of `ServiceSync`: each round of changes that reached the kernel, and what was read back from there."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from podwire.model.addr import Family
from podwire.model.ids import ObjectKey
from podwire.model.objects import EndpointSlice, Service
from podwire.model.servicetable import ServiceTable


@dataclass(frozen=True, slots=True)
class Served:
    """One Service as it is programmed; `service` is None when it is gone."""

    service: Service | None
    slices: tuple[EndpointSlice, ...]
    table: ServiceTable


@dataclass(frozen=True, slots=True)
class Versions:
    """Everything up to these revisions of Services and EndpointSlices; up to `slices_until` no slice changed further."""

    services: str = ""
    slices: str = ""
    slices_until: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One success, or (`error`) one failure, of bringing the kernel up to date.

    changed: Services that changed since the last success. full: the whole was compared with the kernel. commands: how many
    it took; `repaired`: they undid what somebody else did. seconds: how long it took. queued: when (loop time) the first of
    the changes was heard of. forgotten: UDP connections removed by family, in forget_seconds."""

    changed: Mapping[ObjectKey, Served]
    full: bool
    seconds: float
    queued: float
    commands: int = 0
    repaired: bool = False
    forgotten: Mapping[Family, int] = field(default_factory=dict)
    forget_seconds: float = 0.0
    error: str = ""


OnRound = Callable[[Round], None]


class Rounds(Protocol):
    """Whoever tells of rounds."""

    def subscribe(self, observer: OnRound) -> None: ...
