"""Services from API objects in memory to the kernel, beside the chain-per-Service shape loaded by the `nft` program.

1,000 and 10,000 Services with five endpoints each: everything from scratch, and one endpoint changed, planning included.
The other column is the same Services as kube-proxy shapes them (a chain for every Service and every endpoint), which has to
be text for the `nft` program; making the text is not counted. Aim: 0.6 s and 5 ms at 10,000.
"""

import ipaddress
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from bench.report import Figures, main, say, table
from podwire.kernel.netns import create_netns, enter_user_namespace, run_in_netns
from podwire.kernel.nftclient import NftClient
from podwire.kernel.rtnlsocket import open_netlink
from podwire.model.addr import Family
from podwire.model.ids import ObjectKey
from podwire.model.nft import TableRef
from podwire.model.objects import EndpointSlice, Service
from podwire.model.servicetable import NodeFacts
from podwire.plan.services import TABLE, ServicePlanner
from podwire.wire.netlink import NETLINK_NETFILTER

SIZES = (1000, 10_000)
ENDPOINTS = 5
CHANGES = 20
RUNS = 3

FACTS = NodeFacts(
    name="node-1",
    node_ips=(ipaddress.ip_address("198.18.0.11"),),
    pod_cidrs=(ipaddress.ip_network("10.244.1.0/24"),),
    cluster_cidrs=(ipaddress.ip_network("10.244.0.0/16"),),
    service_cidrs=(ipaddress.ip_network("10.96.0.0/12"),),
)


class Item(NamedTuple):
    key: ObjectKey
    service: Service
    piece: EndpointSlice


def run() -> Figures:
    """{"1000": {…}, "10000": {…}}; times in milliseconds, the middle of several.

    As root in network namespaces only: a user namespace bounds a socket's send buffer, and `nft` then cannot load a table of
    this size at all. Ours is also measured inside one, where a lab lives."""
    root = os.geteuid() == 0
    if not root:
        enter_user_namespace()
    figures: Figures = {}
    rows: list[list[object]] = [
        [
            "Services × 5 endpoints",
            "from scratch ms",
            "(plan",
            "commit)",
            "one change ms",
            "chains + nft ms",
            "×",
            "one change ms",
            "×",
        ]
    ]
    for size in SIZES:
        items = [item(number) for number in range(size)]
        ours, theirs = measure_podwire(items), measure_nft(items) if root else None
        figures[str(size)] = {"podwire": ours, "chain_per_service_nft": theirs}
        if theirs:
            ratios = {name: theirs[name] / ours[name] for name in ("scratch_ms", "change_ms")}
            figures[str(size)]["ratio"] = ratios
            others: list[object] = [theirs["scratch_ms"], ratios["scratch_ms"], theirs["change_ms"], ratios["change_ms"]]
        else:
            others = ["needs root and nft", "", "", ""]
        rows.append([size, ours["scratch_ms"], ours["plan_ms"], ours["commit_ms"], ours["change_ms"], *others])
    table(rows)
    say(f"  (aim at 10,000: from scratch ≤ 600 ms, one change ≤ 5 ms; {ours['scratch_cpu_ms']:.0f} ms of it was work)")
    if root:
        enter_user_namespace()
        inside = measure_podwire(items)
        figures[str(SIZES[-1])]["podwire_in_user_namespace"] = inside
        say(f"  {SIZES[-1]} in a user namespace: {inside['scratch_ms']:.0f} ms, one change {inside['change_ms']:.2f} ms")
    return figures


def item(number: int) -> Item:
    """Service number `number` and its slice, decoded from JSON as a watch would."""
    name = f"web-{number}"
    address = str(ipaddress.ip_address("10.96.0.16") + number)
    service = {
        "metadata": {"name": name, "namespace": "shop", "uid": f"uid-{number}"},
        "spec": {
            "type": "ClusterIP",
            "clusterIP": address,
            "clusterIPs": [address],
            "ipFamilies": ["IPv4"],
            "ports": [{"name": "http", "port": 80, "protocol": "TCP", "targetPort": 8080}],
        },
    }
    first = ipaddress.ip_address("10.244.0.2") + number * ENDPOINTS
    ready = {"ready": True, "serving": True, "terminating": False}
    piece = {
        "metadata": {"name": f"{name}-x", "namespace": "shop", "labels": {"kubernetes.io/service-name": name}},
        "addressType": "IPv4",
        "endpoints": [{"addresses": [str(first + n)], "nodeName": f"node-{n}", "conditions": ready} for n in range(ENDPOINTS)],
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
    }
    decoded = msgspec.json.decode(msgspec.json.encode(service), type=Service)
    return Item(decoded.key, decoded, msgspec.json.decode(msgspec.json.encode(piece), type=EndpointSlice))


def milliseconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return (time.perf_counter() - started) * 1000


# --- podwire --------------------------------------------------------------------------------------------------------


def measure_podwire(items: list[Item]) -> Figures:
    runs = [_from_scratch(items) for _ in range(RUNS)]
    return {name: statistics.median(r[name] for r in runs) for name in runs[0]}


def _from_scratch(items: list[Item]) -> dict[str, float]:
    fd = create_netns()
    try:
        with open_netlink(fd, NETLINK_NETFILTER) as sock:
            client, planner = NftClient(sock), ServicePlanner(FACTS)

            def plan() -> None:
                for key, service, piece in items:
                    planner.set_service(key, service, (piece,))

            cpu = time.process_time()
            planned = milliseconds(plan)
            committed = milliseconds(lambda: client.commit(planner.take_batch()))
            cpu = time.process_time() - cpu
            changes = [milliseconds(lambda change=c: _change(planner, client, change)) for c in _changes(items)]  # type: ignore[misc]
            assert len(client.elements(_TABLE, "services")) == len(items)
    finally:
        os.close(fd)
    return {
        "scratch_ms": planned + committed,
        "plan_ms": planned,
        "commit_ms": committed,
        "scratch_cpu_ms": cpu * 1000,
        "change_ms": statistics.median(changes),
    }


_TABLE = TableRef(Family.IPV4, TABLE)


def _changes(items: list[Item]) -> Iterator[Item]:
    """One endpoint less, then back again."""
    for n in range(CHANGES):
        chosen = items[(n // 2) * 37 % len(items)]
        kept = chosen.piece.endpoints[: ENDPOINTS - 1 + n % 2]
        yield chosen._replace(piece=msgspec.structs.replace(chosen.piece, endpoints=kept))


def _change(planner: ServicePlanner, client: NftClient, change: Item) -> None:
    planner.set_service(change.key, change.service, (change.piece,))
    client.commit(planner.take_batch())


# --- a chain for each Service and endpoint, by the nft program --------------------------------------------------------


def measure_nft(items: list[Item]) -> Figures | None:
    """None where there is no nft program."""
    if shutil.which("nft") is None:
        return None
    fd = create_netns()
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "rules"

        def load(text: str) -> float:
            file.write_text(text)

            def nft() -> None:
                subprocess.run(["nft", "-f", str(file)], check=True)

            return milliseconds(lambda: run_in_netns(fd, nft))

        try:
            scratch = load("".join(_shape(items)))
            changes = [load(text) for chosen in items[:3] for text in _one_endpoint(chosen)]
        finally:
            os.close(fd)
    return {"scratch_ms": scratch, "change_ms": statistics.median(changes)}


def _shape(items: list[Item]) -> Iterator[str]:
    """kube-proxy's: the map leads to the Service's chain, that to one of its endpoints' chains, that rewrites."""
    yield "table ip proxy {\n"
    yield "  map service-ips { type ipv4_addr . inet_proto . inet_service : verdict; }\n"
    yield "  chain services { ip daddr . meta l4proto . th dport vmap @service-ips; }\n"
    yield "  chain mark-source { meta mark set meta mark or 0x4000; }\n"
    yield "  chain pre { type nat hook prerouting priority -100; jump services; }\n"
    yield "  chain out { type nat hook output priority -100; jump services; }\n}\n"
    for chosen in items:
        for n, endpoint in enumerate(chosen.piece.endpoints):
            address = endpoint.addresses[0]
            chain = f"endpoint-{chosen.key.name}-{n}"
            yield f"add chain ip proxy {chain}\nadd rule ip proxy {chain} ip saddr {address} jump mark-source\n"
            yield f"add rule ip proxy {chain} meta l4proto tcp dnat to {address}:8080\n"
        yield f"add chain ip proxy service-{chosen.key.name}\n"
        yield _choice(chosen, ENDPOINTS)
    for chosen in items:
        key = f"{chosen.service.spec.cluster_ip} . tcp . 80"
        yield f"add element ip proxy service-ips {{ {key} : goto service-{chosen.key.name} }}\n"


def _choice(chosen: Item, count: int) -> str:
    name = chosen.key.name
    targets = ", ".join(f"{n} : goto endpoint-{name}-{n}" for n in range(count))
    return f"add rule ip proxy service-{name} numgen random mod {count} vmap {{ {targets} }}\n"


def _one_endpoint(chosen: Item) -> Iterator[str]:
    """One endpoint less, then back again: the Service's chain is written anew."""
    flush = f"flush chain ip proxy service-{chosen.key.name}\n"
    yield flush + _choice(chosen, ENDPOINTS - 1)
    yield flush + _choice(chosen, ENDPOINTS)


if __name__ == "__main__":
    main(run)
