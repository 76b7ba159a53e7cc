"""Services from API objects in memory to the kernel, beside the chain-per-Service shape loaded by the `nft` program.

1,000 to 100,000 Services with five endpoints each: everything from scratch, and one change (an endpoint less or more, one in
the place of another, a Service less or more), planning included; and the memory of a `podwire proxy` that serves them. The
other columns are the same Services as kube-proxy shapes them (`servicepeers`), stopped after a while: ">" stands before the
time that did not suffice. Aims: 0.6 s and 5 ms at 10,000, 6 s and 10 ms at 100,000; 120 MB at 10,000.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator

import msgspec

from bench.report import Figures, main, say, table
from bench.serviceobjects import ENDPOINTS, FACTS, Item, item
from bench.servicepeers import measure_iptables, measure_nft, milliseconds
from podwire.kernel.netns import create_netns, enter_user_namespace
from podwire.kernel.nftclient import NftClient
from podwire.kernel.rtnlsocket import open_netlink
from podwire.model.addr import Family
from podwire.model.ids import ObjectKey
from podwire.model.nft import TableRef
from podwire.model.objects import EndpointSlice, Service
from podwire.plan.services import TABLE, ServicePlanner
from podwire.wire.netlink import NETLINK_NETFILTER

SIZES = (1000, 10_000, 50_000, 100_000)
WEIGHED = (10_000, 100_000)
CHANGES = 20
RUNS = 3
PEERS: dict[str, Callable[[list[Item]], Figures | None]] = {
    "chain_per_service_nft": measure_nft,
    "chain_per_service_iptables": measure_iptables,
}


def run() -> Figures:
    """{"1000": {…}, …}; times in milliseconds of processor time, the middle of several, memory in MB.

    As root in network namespaces only: a user namespace bounds a socket's send buffer, and `nft` then cannot load a table of
    this size at all. Ours is also measured inside one, where a lab lives."""
    root = os.geteuid() == 0
    if not root:
        enter_user_namespace()
    figures: Figures = {}
    namespaces: list[int] = []
    items: list[Item] = []
    for size in SIZES:
        items += [item(number) for number in range(len(items), size)]
        found: Figures = {"podwire": measure_podwire(items, namespaces)}
        before = figures[str(SIZES[SIZES.index(size) - 1])] if figures else {}
        for name, measure in PEERS.items():
            stopped = (before.get(name) or {}).get("more_than_ms")
            # A table that is larger still takes longer.
            found[name] = {"more_than_ms": stopped} if stopped else measure(items) if root else None
        figures[str(size)] = found
    for fd in namespaces:
        os.close(fd)
    del items
    for size in WEIGHED:
        figures[str(size)]["podwire"] |= _weigh(size)
    _show(figures)
    if root:
        _measure_inside(figures)
    return figures


def _show(figures: Figures) -> None:
    heads = ("Services × 5", "scratch ms", "endpoint ±", "another", "Service ±", "PSS MB")
    rows: list[list[object]] = [[*heads, "chains, nft ms", "endpoint ±", "chains, iptables ms", "endpoint ±"]]
    for size, found in figures.items():
        ours = found["podwire"]
        cells = [ours[name] for name in ("scratch_ms", "change_ms", "replace_ms", "service_ms")]
        rows.append([f"{int(size):,}", *cells, ours.get("pss_mb", ""), *_peer(found[_NFT]), *_peer(found[_IPTABLES])])
    table(rows)
    say("  (aims: 600 ms, 5 ms and 120 MB at 10,000; 6,000 ms and 10 ms at 100,000; >: stopped; -: not there, or not as root)")


_NFT, _IPTABLES = PEERS


def _peer(found: Figures | None) -> list[object]:
    if found is None:
        return ["-", "-"]
    stopped = found.get("more_than_ms")
    return [f"> {stopped:,.0f}", "-"] if stopped else [found["scratch_ms"], found["change_ms"]]


def _measure_inside(figures: Figures) -> None:
    enter_user_namespace()
    namespaces: list[int] = []
    inside = measure_podwire([item(number) for number in range(10_000)], namespaces)
    figures["10000"]["podwire_in_user_namespace"] = inside
    say(f"  10,000 in a user namespace: {inside['scratch_ms']:.0f} ms, one change {inside['change_ms']:.2f} ms")


def _weigh(size: int) -> Figures:
    """What a proxy weighs that serves so many; see `proxyweight`. Empty where it was not ready in time."""
    done = subprocess.run([sys.executable, "-m", "bench.proxyweight", str(size)], stdout=subprocess.PIPE, check=False)
    return dict(json.loads(done.stdout)) if done.returncode == 0 else {}


# --- podwire --------------------------------------------------------------------------------------------------------


def measure_podwire(items: list[Item], namespaces: list[int]) -> Figures:
    """The namespaces are left for the caller to close: the kernel takes down tables of this size in the background."""
    runs = []
    for _ in range(RUNS if len(items) <= 10_000 else 1):
        namespaces.append(create_netns())
        runs.append(_from_scratch(items, namespaces[-1]))
    return {name: statistics.median(r[name] for r in runs) for name in runs[0]}


def _from_scratch(items: list[Item], fd: int) -> dict[str, float]:
    with open_netlink(fd, NETLINK_NETFILTER) as sock:
        client, planner = NftClient(sock), ServicePlanner(FACTS)

        def plan() -> None:
            for key, service, piece in items:
                planner.set_service(key, service, (piece,))

        planned = milliseconds(plan)
        committed = milliseconds(lambda: client.commit(planner.take_batch()))

        def middle(changes: Iterable[Change]) -> float:
            return statistics.median(milliseconds(lambda c=c: _change(planner, client, c)) for c in changes)  # type: ignore[misc]

        figures = {
            "scratch_ms": planned + committed,
            "plan_ms": planned,
            "commit_ms": committed,
            "change_ms": middle(_changes(items)),
            "replace_ms": middle(_replacements(items)),
            "service_ms": middle(_newcomers(len(items))),
        }
        assert len(client.elements(TableRef(Family.IPV4, TABLE), "services")) == len(items)
    return figures


Change = tuple[ObjectKey, Service | None, tuple[EndpointSlice, ...]]


def _changes(items: list[Item]) -> Iterator[Change]:
    """One endpoint less, then back again."""
    for n in range(CHANGES):
        key, service, piece = items[(n // 2) * 37 % len(items)]
        kept = piece.endpoints[: ENDPOINTS - 1 + n % 2]
        yield key, service, (msgspec.structs.replace(piece, endpoints=kept),)


def _replacements(items: list[Item]) -> Iterator[Change]:
    """One endpoint in the place of another."""
    for n in range(CHANGES):
        key, service, piece = items[(n * 37 + 11) % len(items)]
        other = msgspec.structs.replace(piece.endpoints[0], addresses=(f"10.200.1.{n + 1}",))
        yield key, service, (msgspec.structs.replace(piece, endpoints=(other, *piece.endpoints[1:])),)


def _newcomers(number: int) -> Iterator[Change]:
    """A Service more with its endpoints, then gone again."""
    for n in range(CHANGES):
        key, service, piece = item(number + n // 2)
        yield (key, service, (piece,)) if n % 2 == 0 else (key, None, ())


def _change(planner: ServicePlanner, client: NftClient, change: Change) -> None:
    planner.set_service(*change)
    client.commit(planner.take_batch())


if __name__ == "__main__":
    main(run)
