"""An overlay agent at one moment, and as Prometheus' metrics."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from podwire.agent.exposition import family
from podwire.agent.subnets.port import Holding, SubnetCounters


@dataclass(frozen=True, slots=True, kw_only=True)
class OverlayStatus:
    """An overlay agent at one moment.

    programmed: the node's own network is in the kernel and subnet.env is written. refused: peers (by name) that this back end
    cannot reach, and why. apply_seconds: what the last change of peers took. degraded: what does not work, in words."""

    node: str
    backend: str
    programmed: bool
    holding: Holding
    why: str = ""
    peers: int = 0
    refused: Mapping[str, str] = field(default_factory=dict)
    repaired: Mapping[str, int] = field(default_factory=dict)
    apply_seconds: float = 0.0
    counters: SubnetCounters = field(default_factory=SubnetCounters)
    degraded: Mapping[str, str] = field(default_factory=dict)

    @property
    def obstacles(self) -> tuple[str, ...]:
        """Why the node is not fully part of the overlay; empty where it is."""
        words = [] if self.programmed else ["the node's network is not programmed yet"]
        if self.holding is not Holding.HELD:
            words.append(f"no lease is held: {self.why or 'none was acquired yet'}")
        words += [f"{subject}: {reason}" for subject, reason in self.degraded.items()]
        return tuple(words)


def metrics_text(status: OverlayStatus) -> str:
    """The metrics, by Prometheus' conventions: counters end in _total, times are seconds."""
    families = [
        family("podwire_overlay_info", "gauge", "The back end in use.", [({"backend": status.backend}, 1)]),
        family(
            "podwire_overlay_lease_held", "gauge", "Whether this node holds its lease.", [({}, status.holding is Holding.HELD)]
        ),
        family("podwire_overlay_peers", "gauge", "Other nodes that are programmed.", [({}, status.peers)]),
        family(
            "podwire_overlay_peers_refused",
            "gauge",
            "Other nodes that this back end cannot reach.",
            [({}, len(status.refused))],
        ),
        family(
            "podwire_overlay_degraded",
            "gauge",
            "What does not work at the moment.",
            [({"subject": s}, 1) for s in status.degraded],
        ),
        family(
            "podwire_overlay_repaired_total",
            "counter",
            "Things that others changed and that were put back.",
            [({"kind": kind}, count) for kind, count in sorted(status.repaired.items())],
        ),
        family("podwire_overlay_apply_seconds", "gauge", "What the last change of peers took.", [({}, status.apply_seconds)]),
    ]
    lease_events = [
        ({"event": name}, getattr(status.counters, name))
        for name in ("acquired", "renewed", "renew_failures", "lost", "races", "relists")
    ]
    families.append(family("podwire_overlay_lease_events_total", "counter", "What became of this node's lease.", lease_events))
    return "".join(families)
