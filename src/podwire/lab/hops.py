"""From captured frames to hops, and from hops to a verdict: pure, nothing here is assumed about the way taken."""

from collections.abc import Sequence
from dataclasses import dataclass

from podwire.kernel.capture import Captured
from podwire.lab.probes import BALANCER, WORLD, Probe
from podwire.wire.packet import Packet, endpoint, parse_frame


@dataclass(frozen=True, slots=True)
class Hop:
    """The probe's packet on one device. `outer` is the tunnel packet that carried it, `rewritten` what changed since the
    hop before, `conntrack` the kernel's own record of that change, where it has one."""

    place: str
    device: str
    outgoing: bool
    packet: Packet
    outer: Packet | None = None
    rewritten: str = ""
    conntrack: str = ""


def hops_from(frames: Sequence[Captured]) -> list[Hop]:
    """Frames that hold the probe's payload, by time → hops in order; repeats (retransmissions) are left out.

    The way ends where the packet turns round: an echo carries the payload back."""
    hops: list[Hop] = []
    seen: set[tuple[object, ...]] = set()
    previous: Packet | None = None
    for frame in frames:
        parsed = parse_frame(frame.data)
        if parsed is None or parsed.packet is None:
            continue
        packet, outer = parsed.packet.innermost, parsed.packet if parsed.packet.inner is not None else None
        if previous is not None and _answers(packet, previous):
            break
        key = (frame.place, frame.device, frame.outgoing, packet.flow, outer is not None)
        if key in seen:
            continue
        seen.add(key)
        rewritten = rewriting(previous, packet) if previous is not None else ""
        hops.append(Hop(frame.place, frame.device, frame.outgoing, packet, outer, rewritten))
        previous = packet
    return hops


def _answers(packet: Packet, previous: Packet) -> bool:
    return (packet.src, packet.sport, packet.dst, packet.dport) == (previous.dst, previous.dport, previous.src, previous.sport)


def rewriting(before: Packet, after: Packet) -> str:
    """What an address translation changed, in words; empty if nothing."""
    changes = []
    if (before.dst, before.dport) != (after.dst, after.dport):
        changes.append(f"destination {endpoint(before.dst, before.dport)} → {endpoint(after.dst, after.dport)}")
    if (before.src, before.sport) != (after.src, after.sport):
        changes.append(f"source {endpoint(before.src, before.sport)} → {endpoint(after.src, after.sport)}")
    return ", ".join(changes)


def objection(probe: Probe, hops: Sequence[Hop]) -> str:
    """Why an answered probe still does not count as the path it was to show; empty if it does."""
    if not hops:
        return "answered, but no packet was seen on the way"
    last = hops[-1]
    if probe.ends_at and last.place not in probe.ends_at:
        return f"the packet ended in {last.place}, not in {' or '.join(sorted(probe.ends_at))}"
    if probe.keeps_source and any(hop.rewritten for hop in hops):
        return "an address was rewritten on the way: " + next(hop.rewritten for hop in hops if hop.rewritten)
    if probe.passes and all(hop.place != probe.passes for hop in hops):
        return f"the packet did not pass the {probe.passes}"
    if probe.crosses_nodes and len(nodes_passed(hops)) < 2:
        return "the packet was not seen on two nodes"
    return ""


def nodes_passed(hops: Sequence[Hop]) -> list[str]:
    """The nodes on the way, each once (places without a `/` are nodes, except the two outside)."""
    return list(dict.fromkeys(h.place for h in hops if "/" not in h.place and h.place not in (WORLD, BALANCER)))
