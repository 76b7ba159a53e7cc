"""The paths report: as a document for machines, and as lines for people."""

from collections.abc import Iterator, Sequence

from podwire.lab.hops import Hop
from podwire.lab.paths import PathResult
from podwire.model.meta import Json
from podwire.wire.packet import Packet


def document(results: Sequence[PathResult]) -> Json:
    """`{"paths": [{"path", "from", "to", "hops": […], "rtt_ms", "ok", "reason"}, …]}`."""
    return {"paths": [_path(result) for result in results]}


def _path(result: PathResult) -> Json:
    probe = result.probe
    return {
        "path": str(probe.path),
        "from": probe.sender,
        "to": probe.target,
        "hops": [_hop(hop) for hop in result.hops],
        "rtt_ms": result.rtt_ms,
        "ok": result.ok,
        "reason": result.reason,
    }


def _hop(hop: Hop) -> Json:
    return {
        "place": hop.place,
        "device": hop.device,
        "direction": "out" if hop.outgoing else "in",
        "packet": hop.packet.flow,
        "encapsulation": _encapsulation(hop.outer) if hop.outer else None,
        "rewritten": hop.rewritten or None,
        "conntrack": hop.conntrack or None,
    }


def _encapsulation(outer: Packet) -> Json:
    vni = {} if outer.vni is None else {"vni": outer.vni}
    return {"type": outer.tunnel, **vni, "outer": outer.flow}


def all_ok(report: Json) -> bool:
    """Whether there is at least one path and every one works."""
    return bool(report["paths"]) and all(path["ok"] for path in report["paths"])


def summary(report: Json) -> str:
    if not report["paths"]:
        return "nothing to probe: no pod is ready (`kubectl get pods -A`)"
    good = sum(1 for path in report["paths"] if path["ok"])
    return f"{good} of {len(report['paths'])} probes took their path"


def lines(report: Json) -> Iterator[str]:
    """The report as text: a headline per path, then its hops by place. Works on the document, so any client can print it."""
    previous = None
    for path in report["paths"]:
        if path["path"] != previous:
            yield ""
            yield path["path"]
            previous = path["path"]
        mark = "✓" if path["ok"] else "✗"
        rtt = f"   {path['rtt_ms']:.3f} ms" if path["rtt_ms"] is not None else ""
        yield f"  {mark} {path['from']} → {path['to']}{rtt}"
        if path["reason"]:
            yield f"      {path['reason']}"
        yield from (f"      {line}" for line in _way(path["hops"]))


_IN = "    in "


def _way(hops: Sequence[Json]) -> Iterator[str]:
    """One line a place: the devices passed, and under it what happened to the packet there."""
    place, devices, notes = "", [], []  # type: tuple[str, list[str], list[str]]
    for hop in hops:
        if hop["place"] != place and devices:
            yield f"{place}: {' → '.join(devices)}"
            yield from notes
            devices, notes = [], []
        place = hop["place"]
        if not devices or devices[-1] != hop["device"]:
            devices.append(hop["device"])
        if hop["rewritten"]:
            notes.append(f"    rewritten: {hop['rewritten']}" + (" (conntrack agrees)" if hop["conntrack"] else ""))
        tunnel = hop["encapsulation"]
        if tunnel and not any(note.startswith(_IN) for note in notes):
            vni = f" {tunnel['vni']}" if "vni" in tunnel else ""
            notes.append(f"{_IN}{tunnel['type'].upper()}{vni}: {tunnel['outer']}")
    if devices:
        yield f"{place}: {' → '.join(devices)}"
        yield from notes
