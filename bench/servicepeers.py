"""The same Services as kube-proxy shapes them, a chain for every Service and every endpoint: as text for the `nft` program and
for `iptables-restore`. Making the text is not counted."""

import os
import resource
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from bench.report import Figures
from bench.serviceobjects import ENDPOINTS, Item
from podwire.kernel.netns import create_netns, run_in_netns

PATIENCE_SECONDS = 20.0
"""A program that takes longer is stopped."""

Load = Callable[[str], float]
"""Text → milliseconds of processor time. Raises subprocess.TimeoutExpired."""


def milliseconds(work: Callable[[], object]) -> float:
    """Processor time, ours and that of programs that ended meanwhile: the kernel works within the system calls, nobody waits
    for anything, and what else the machine does does not count."""
    started = _processor_seconds()
    work()
    return (_processor_seconds() - started) * 1000


def _processor_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def measure_nft(items: list[Item]) -> Figures | None:
    """{"scratch_ms", "change_ms"}, or {"more_than_ms"} where it was stopped; None where there is no nft program."""
    if shutil.which("nft") is None:
        return None
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "rules"

        def nft(text: str) -> None:
            file.write_text(text)
            subprocess.run(["nft", "-f", str(file)], check=True, timeout=PATIENCE_SECONDS)

        changes = (text for chosen in items[:3] for text in _one_endpoint(chosen))
        return _measure(nft, "".join(_shape(items)), changes)


def measure_iptables(items: list[Item]) -> Figures | None:
    """The same of kube-proxy's chains in iptables, restored as it does: all at once, then only what changed."""
    program = next(filter(None, map(shutil.which, ("iptables-legacy-restore", "iptables-restore"))), None)
    if program is None:
        return None

    def restore(text: str) -> None:
        subprocess.run([program, "--noflush", "-w"], input=text, text=True, check=True, timeout=PATIENCE_SECONDS)

    changes = (_restore_one(chosen, count) for chosen in items[:2] for count in (ENDPOINTS - 1, ENDPOINTS))
    return _measure(restore, iptables_shape(items), changes)


def _measure(run: Callable[[str], None], everything: str, changes: Iterable[str]) -> Figures:
    fd = create_netns()

    def load(text: str) -> float:
        return milliseconds(lambda: run_in_netns(fd, lambda: run(text)))

    try:
        return {"scratch_ms": load(everything), "change_ms": statistics.median(map(load, changes))}
    except subprocess.TimeoutExpired:
        return {"more_than_ms": PATIENCE_SECONDS * 1000}
    finally:
        os.close(fd)


# --- as kube-proxy has it in nftables -------------------------------------------------------------------------------


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


# --- in iptables ----------------------------------------------------------------------------------------------------


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
