"""Services from API objects in memory to the kernel, beside the chain-per-Service shape loaded by the `nft` program.

1,000 to 100,000 Services with five endpoints each: everything from scratch, and one endpoint changed, planning included; and
the memory of the process that holds them. The other columns are the same Services as kube-proxy shapes them (a chain for
every Service and every endpoint), as text for the `nft` program and for `iptables-restore`; making the text is not counted,
and where one takes too long it is left out at the larger sizes. Aims: 0.6 s and 5 ms at 10,000, 6 s and 10 ms at 100,000.
"""

import gc
import ipaddress
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib import import_module
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

SIZES = (1000, 10_000, 50_000, 100_000)
PATIENCE_SECONDS = 60.0
"""A shape that takes longer at one size is not measured at the next, and not finished where it takes so long."""
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
    """{"1000": {…}, …}; times in milliseconds of processor time, the middle of several, memory in MB.

    As root in network namespaces only: a user namespace bounds a socket's send buffer, and `nft` then cannot load a table of
    this size at all. Ours is also measured inside one, where a lab lives."""
    root = os.geteuid() == 0
    if not root:
        enter_user_namespace()
    figures: Figures = {}
    rows: list[list[object]] = [
        ["Services × 5", "scratch ms", "one change ms", "RSS MB", "chains, nft ms", "change", "chains, iptables ms", "change"]
    ]
    others: dict[str, Callable[[list[Item]], Figures | None]] = (
        {"chain_per_service_nft": measure_nft, "chain_per_service_iptables": measure_iptables} if root else {}
    )
    for size in SIZES:
        memory = measure_memory(size)
        items = [item(number) for number in range(size)]
        ours = measure_podwire(items) | memory
        figures[str(size)] = {"podwire": ours}
        cells: list[object] = [size, ours["scratch_ms"], ours["change_ms"], ours["rss_mb"]]
        for name in ("chain_per_service_nft", "chain_per_service_iptables"):
            found = others[name](items) if name in others else None
            figures[str(size)][name] = found
            cells += [found["scratch_ms"], found["change_ms"]] if found else ["-", "-"]
            if found is None or found["scratch_ms"] > PATIENCE_SECONDS * 1000 / 8:
                others.pop(name, None)
        rows.append(cells)
    table(rows)
    say("  (aims: 600 ms, 5 ms and 120 MB at 10,000; 6,000 ms and 10 ms at 100,000; -: not there, or it takes minutes)")
    if root:
        enter_user_namespace()
        items = [item(number) for number in range(10_000)]
        inside = measure_podwire(items)
        figures["10000"]["podwire_in_user_namespace"] = inside
        say(f"  10000 in a user namespace: {inside['scratch_ms']:.0f} ms, one change {inside['change_ms']:.2f} ms")
    return figures


def measure_memory(size: int) -> Figures:
    """What a process weighs that knows so many Services: decoded objects, plan, rules, counted after the commit."""
    code = f"import bench.services as b; print(b.weigh({size}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {"rss_mb": float(done.stdout)}


def weigh(size: int) -> float:
    """This process's resident memory in MB, with `size` Services held and committed in a namespace of its own."""
    import_module("podwire.cli.proxyrun")  # all that `podwire proxy` has loaded
    enter_user_namespace()
    fd = create_netns()
    with open_netlink(fd, NETLINK_NETFILTER) as sock:
        client, planner = NftClient(sock), ServicePlanner(FACTS)
        held = []
        for number in range(size):
            chosen = item(number)
            held.append(chosen)
            planner.set_service(chosen.key, chosen.service, (chosen.piece,))
        client.commit(planner.take_batch())
        gc.collect()
        status = Path("/proc/self/status").read_text()
    os.close(fd)
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) / 1024


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
    """Processor time, ours and that of programs that ended meanwhile: the kernel works within the system calls, nobody waits
    for anything, and what else the machine does does not count."""
    started = _processor_seconds()
    work()
    return (_processor_seconds() - started) * 1000


def _processor_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


# --- podwire --------------------------------------------------------------------------------------------------------


def measure_podwire(items: list[Item]) -> Figures:
    runs = [_from_scratch(items) for _ in range(RUNS if len(items) <= 10_000 else 1)]
    return {name: statistics.median(r[name] for r in runs) for name in runs[0]}


def _from_scratch(items: list[Item]) -> dict[str, float]:
    fd = create_netns()
    try:
        with open_netlink(fd, NETLINK_NETFILTER) as sock:
            client, planner = NftClient(sock), ServicePlanner(FACTS)

            def plan() -> None:
                for key, service, piece in items:
                    planner.set_service(key, service, (piece,))

            planned = milliseconds(plan)
            committed = milliseconds(lambda: client.commit(planner.take_batch()))
            changes = [milliseconds(lambda change=c: _change(planner, client, change)) for c in _changes(items)]  # type: ignore[misc]
            replaced = [milliseconds(lambda change=c: _change(planner, client, change)) for c in _replacements(items)]  # type: ignore[misc]
            assert len(client.elements(_TABLE, "services")) == len(items)
    finally:
        os.close(fd)
    return {
        "scratch_ms": planned + committed,
        "plan_ms": planned,
        "commit_ms": committed,
        "change_ms": statistics.median(changes),
        "replace_ms": statistics.median(replaced),
    }


_TABLE = TableRef(Family.IPV4, TABLE)


def _changes(items: list[Item]) -> Iterator[Item]:
    """One endpoint less, then back again."""
    for n in range(CHANGES):
        chosen = items[(n // 2) * 37 % len(items)]
        kept = chosen.piece.endpoints[: ENDPOINTS - 1 + n % 2]
        yield chosen._replace(piece=msgspec.structs.replace(chosen.piece, endpoints=kept))


def _replacements(items: list[Item]) -> Iterator[Item]:
    """One endpoint in the place of another: the number stays, so no verdict changes."""
    for n in range(CHANGES):
        chosen = items[(n * 37 + 11) % len(items)]
        other = msgspec.structs.replace(chosen.piece.endpoints[0], addresses=(f"10.200.1.{n + 1}",))
        endpoints = (other, *chosen.piece.endpoints[1:])
        yield chosen._replace(piece=msgspec.structs.replace(chosen.piece, endpoints=endpoints))


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
                subprocess.run(["nft", "-f", str(file)], check=True, timeout=PATIENCE_SECONDS)

            return milliseconds(lambda: run_in_netns(fd, nft))

        try:
            scratch = load("".join(_shape(items)))
            changes = [load(text) for chosen in items[:3] for text in _one_endpoint(chosen)]
        except subprocess.TimeoutExpired:
            return None
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


# --- the same, by iptables-restore ------------------------------------------------------------------------------------


def measure_iptables(items: list[Item]) -> Figures | None:
    """kube-proxy's chains, restored as it does: all at once, then only what changed. None where there is no iptables."""
    program = next(filter(None, map(shutil.which, ("iptables-legacy-restore", "iptables-restore"))), None)
    if program is None:
        return None
    fd = create_netns()

    def load(text: str) -> float:
        def restore() -> None:
            command = [program, "--noflush", "-w"]
            subprocess.run(command, input=text, text=True, check=True, timeout=PATIENCE_SECONDS)

        return milliseconds(lambda: run_in_netns(fd, restore))

    try:
        scratch = load(iptables_shape(items))
        changes = [load(_restore_one(chosen, count)) for chosen in items[:2] for count in (ENDPOINTS - 1, ENDPOINTS)]
    except subprocess.TimeoutExpired:
        return None
    finally:
        os.close(fd)
    return {"scratch_ms": scratch, "change_ms": statistics.median(changes)}


def iptables_shape(items: list[Item]) -> str:
    """A table for iptables-restore: KUBE-SERVICES is searched from top to bottom."""
    lines = ["*nat", ":KUBE-SERVICES - [0:0]", ":KUBE-MARK-MASQ - [0:0]"]
    for number in range(len(items)):
        lines += [f":KUBE-SVC-{number} - [0:0]", *(f":KUBE-SEP-{number}-{n} - [0:0]" for n in range(ENDPOINTS))]
    lines += ["-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000", "-A PREROUTING -j KUBE-SERVICES", "-A OUTPUT -j KUBE-SERVICES"]
    for number, chosen in enumerate(items):
        ip = chosen.service.spec.cluster_ip
        lines.append(f"-A KUBE-SERVICES -d {ip}/32 -p tcp -m tcp --dport 80 -j KUBE-SVC-{number}")
        lines += _iptables_choice(number, ENDPOINTS)
        for n, endpoint in enumerate(chosen.piece.endpoints):
            address = endpoint.addresses[0]
            lines.append(f"-A KUBE-SEP-{number}-{n} -s {address}/32 -j KUBE-MARK-MASQ")
            lines.append(f"-A KUBE-SEP-{number}-{n} -p tcp -m tcp -j DNAT --to-destination {address}:8080")
    return "\n".join((*lines, "COMMIT", ""))


def _iptables_choice(number: int, count: int) -> list[str]:
    some = [
        f"-A KUBE-SVC-{number} -m statistic --mode random --probability {1 / (count - n):.10f} -j KUBE-SEP-{number}-{n}"
        for n in range(count - 1)
    ]
    return [*some, f"-A KUBE-SVC-{number} -j KUBE-SEP-{number}-{count - 1}"]


def _restore_one(chosen: Item, count: int) -> str:
    number = int(chosen.key.name.removeprefix("web-"))
    return "\n".join(("*nat", f":KUBE-SVC-{number} - [0:0]", *_iptables_choice(number, count), "COMMIT", ""))


if __name__ == "__main__":
    main(run)
