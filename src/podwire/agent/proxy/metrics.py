"""A proxy's metrics: kube-proxy's, under their names and with their meaning, and our own.

Both families are one transaction here, so what kube-proxy counts for each has no label ip_family.
"""

import socket
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from podwire.agent.exposition import Histogram, Samples, exponential, family
from podwire.agent.rounds import Round, Versions
from podwire.kernel.port import Kernel
from podwire.model.addr import Family
from podwire.model.ids import ObjectKey
from podwire.model.objects import EndpointSlice, Service
from podwire.model.proxymode import ProxyMode
from podwire.model.servicetable import Frontend, ServiceTable, backend_address, backend_port
from podwire.model.timestamps import parse_time
from podwire.plan.services_maps import frontend_key
from podwire.plan.services_rules import sets_of, table_ref

LAST_CHANGE = "endpoints.kubernetes.io/last-change-trigger-time"
_PROTOCOLS = {6: "TCP", 17: "UDP", 132: "SCTP"}
_SYNC_BOUNDS = exponential(0.001, 2, 15)
_PROGRAMMING_BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 3, 4, 5, 10, 20, 30, 60, 120, 300)
_RECONCILE_BOUNDS = exponential(0.001, 2, 15)


@dataclass(slots=True)
class ProxyMetrics:
    """Give every `Round` to `round`. `started` and `wall` are seconds since the epoch; changes before the start are not
    counted as programmed late."""

    wall: Callable[[], float]
    loop_time: Callable[[], float]
    mode: Callable[[], ProxyMode | None]
    started: float = field(init=False)
    services: dict[ObjectKey, Service] = field(default_factory=dict)
    tables: dict[ObjectKey, ServiceTable] = field(default_factory=dict)
    last_success: float = 0.0
    last_queued: float = 0.0
    failing_since: float | None = None
    healthz: Counter[int] = field(default_factory=Counter)
    livez: Counter[int] = field(default_factory=Counter)
    _sync: Histogram = field(default_factory=lambda: Histogram(_SYNC_BOUNDS))
    _full: Histogram = field(default_factory=lambda: Histogram(_SYNC_BOUNDS))
    _partial: Histogram = field(default_factory=lambda: Histogram(_SYNC_BOUNDS))
    _programming: Histogram = field(default_factory=lambda: Histogram(_PROGRAMMING_BOUNDS))
    _reconcile: Histogram = field(default_factory=lambda: Histogram(_RECONCILE_BOUNDS))
    _totals: Counter[str] = field(default_factory=Counter)
    _triggers: dict[ObjectKey, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.started = self.wall()

    def round(self, done: Round) -> None:
        """Take note of a round of `ServiceSync`."""
        now = self.wall()
        if done.error:
            self._totals["failures"] += 1
            if self.failing_since is None:
                self.failing_since = now
            return
        self.failing_since = None
        self.last_success = now
        self.last_queued = now - (self.loop_time() - done.queued)
        self._sync.observe(done.seconds)
        (self._full if done.full else self._partial).observe(done.seconds)
        self._reconcile.observe(done.forget_seconds)
        self._totals["forgotten"] += done.forgotten
        self._totals["commands"] += done.commands
        self._totals["repairs"] += done.repaired
        for key, served in done.changed.items():
            self._changed(key, served.service, served.table, served.slices, now)

    def _changed(
        self, key: ObjectKey, service: Service | None, table: ServiceTable, slices: Sequence[EndpointSlice], now: float
    ) -> None:
        if self.services.get(key) != service:
            self._totals["service changes"] += 1
        if self.tables.get(key, ServiceTable()) != table:
            self._totals["endpoint changes"] += 1
        if service is None:
            self.services.pop(key, None)
            self.tables.pop(key, None)
        else:
            self.services[key], self.tables[key] = service, table
        for piece in slices:
            triggered = _triggered(piece)
            if triggered is None or triggered == self._triggers.get(piece.key):
                continue
            self._triggers[piece.key] = triggered
            if triggered >= self.started:
                self._programming.observe(max(0.0, now - triggered))

    def no_local_endpoints(self) -> dict[str, int]:
        """Frontends by the policy that leaves them without endpoints here, though there are some elsewhere."""
        found = {"internal": 0, "external": 0}
        for table in self.tables.values():
            for frontend in table.frontends:
                found["internal"] += not frontend.inside.backends and frontend.inside.drop
                found["external"] += frontend.outside is not None and not frontend.outside.backends and frontend.outside.drop
        return found

    def text(self, repaired: Mapping[str, int], degraded: Mapping[str, str], acknowledged: Versions | None) -> str:
        """Everything but the counters that are read from the kernel."""
        return "".join((*self._kube_proxys(), *self._ours(repaired, degraded, acknowledged)))

    def _kube_proxys(self) -> Iterator[str]:
        name, total = "kubeproxy_sync_proxy_rules", self._totals
        yield self._sync.text(f"{name}_duration_seconds", "Time that a round of changes took.")
        yield self._full.text("kubeproxy_sync_full_proxy_rules_duration_seconds", "Rounds that compared everything.")
        yield self._partial.text("kubeproxy_sync_partial_proxy_rules_duration_seconds", "Rounds of what had changed.")
        yield self._programming.text(
            "kubeproxy_network_programming_duration_seconds", "From the change of a pod or Service to the rules."
        )
        yield family(f"{name}_endpoint_changes_pending", "gauge", "Changes that are not programmed yet.", [({}, 0)])
        yield family(f"{name}_endpoint_changes_total", "counter", "Changes of endpoints.", [({}, total["endpoint changes"])])
        yield family(f"{name}_service_changes_pending", "gauge", "Changes that are not programmed yet.", [({}, 0)])
        yield family(f"{name}_service_changes_total", "counter", "Changes of Services.", [({}, total["service changes"])])
        yield family(f"{name}_last_timestamp_seconds", "gauge", "When rules were last right.", [({}, self.last_success)])
        yield family(
            f"{name}_last_queued_timestamp_seconds", "gauge", "When the last change was heard of.", [({}, self.last_queued)]
        )
        mode = self.mode()
        if mode is ProxyMode.NFTABLES:
            yield family(f"{name}_nftables_sync_failures_total", "counter", "Refused transactions.", [({}, total["failures"])])
            yield family(
                f"{name}_nftables_cleanup_failures_total", "counter", "Always 0: one transaction does both.", [({}, 0)]
            )
        if mode is ProxyMode.IPTABLES:
            yield family(
                f"{name}_iptables_restore_failures_total", "counter", "Refused iptables-restore.", [({}, total["failures"])]
            )
            yield family(f"{name}_iptables_partial_restore_failures_total", "counter", "The same.", [({}, total["failures"])])
        policies: Samples = [({"traffic_policy": policy}, count) for policy, count in self.no_local_endpoints().items()]
        yield family(f"{name}_no_local_endpoints_total", "gauge", "Frontends without local endpoints, by policy.", policies)
        for probe, counts in (("healthz", self.healthz), ("livez", self.livez)):
            codes: Samples = [({"code": str(code)}, count) for code, count in sorted(counts.items())]
            yield family(f"kubeproxy_proxy_{probe}_total", "counter", f"Answers of /{probe} by status.", codes)
        yield self._reconcile.text("kubeproxy_conntrack_reconciler_sync_duration_seconds", "Time to forget stale UDP flows.")
        yield family(
            "kubeproxy_conntrack_reconciler_deleted_entries_total", "counter", "Stale UDP flows.", [({}, total["forgotten"])]
        )

    def _ours(self, repaired: Mapping[str, int], degraded: Mapping[str, str], acknowledged: Versions | None) -> Iterator[str]:
        name, total = "podwire_proxy", self._totals
        mode = self.mode()
        served = sum(bool(table.frontends) for table in self.tables.values())
        yield family(f"{name}_info", "gauge", "The back end in use.", [({"mode": str(mode)}, 1)] if mode else [])
        yield family(f"{name}_services", "gauge", "Services that are served.", [({}, served)])
        yield family(f"{name}_commands_total", "counter", "Commands given to the kernel.", [({}, total["commands"])])
        yield family(f"{name}_repairs_total", "counter", "Times that rules were put back.", [({}, total["repairs"])])
        kinds: Samples = [({"kind": kind}, count) for kind, count in sorted(repaired.items())]
        yield family(f"{name}_repaired_total", "counter", "Things that others changed and that were put back.", kinds)
        subjects: Samples = [({"subject": subject}, 1) for subject in sorted(degraded)]
        yield family(f"{name}_degraded", "gauge", "What does not work at the moment.", subjects)
        generation: list[tuple[dict[str, str], float]] = []
        if acknowledged is not None:
            for kind, version in (("services", acknowledged.services), ("endpointslices", acknowledged.slices)):
                generation += [({"resource": kind}, float(version))] if version.isdecimal() else []
        yield family(f"{name}_programmed_resource_version", "gauge", "Read back from the kernel up to there.", generation)


def _triggered(piece: EndpointSlice) -> float | None:
    text = piece.metadata.annotations.get(LAST_CHANGE)
    try:
        return parse_time(text).timestamp() if text else None
    except ValueError:
        return None


# --- counters of the kernel ---------------------------------------------------------------------------------------


async def service_connections(kernel: Kernel, tables: Mapping[ObjectKey, ServiceTable]) -> str:
    """New connections by Service and frontend: the counters of the elements they were looked up by (nftables only)."""
    counts: dict[bytes, int] = {}
    for fam in Family:
        sets = sets_of(fam)
        for of in (sets.services, sets.outside):
            for key, (_, (packets, _)) in (await kernel.count_nft(table_ref(fam), of)).items():
                counts[key] = counts.get(key, 0) + packets
    samples = [
        (_labels(key, frontend), counts[frontend_key(frontend)])
        for key, table in sorted(tables.items())
        for frontend in table.frontends
        if frontend_key(frontend) in counts
    ]
    return family("podwire_service_connections_total", "counter", "New connections to a Service's addresses.", samples)


async def endpoint_connections(kernel: Kernel, tables: Mapping[ObjectKey, ServiceTable]) -> str:
    """New connections by Service, frontend and endpoint; those that follow an affinity are not among them."""
    counts: dict[tuple[bytes, bytes], int] = {}
    for fam in Family:
        sets = sets_of(fam)
        for of in (sets.endpoints, sets.local_endpoints):
            for key, (data, (packets, _)) in (await kernel.count_nft(table_ref(fam), of)).items():
                if isinstance(data, bytes):
                    counts[key[:-4], data] = counts.get((key[:-4], data), 0) + packets
    samples = []
    for service, table in sorted(tables.items()):
        for frontend in table.frontends:
            outside = frontend.outside.backends if frontend.outside else ()
            for packed in dict.fromkeys((*frontend.inside.backends, *outside)):
                found = counts.get((frontend_key(frontend), packed))
                if found is not None:
                    endpoint = f"{_address(backend_address(packed))}:{backend_port(packed)}"
                    samples.append(({**_labels(service, frontend), "endpoint": endpoint}, found))
    return family("podwire_endpoint_connections_total", "counter", "New connections to an endpoint.", samples)


def _labels(key: ObjectKey, frontend: Frontend) -> dict[str, str]:
    return {
        "namespace": key.namespace,
        "service": key.name,
        "port_name": frontend.port_name,
        "protocol": _PROTOCOLS.get(frontend.protocol, str(frontend.protocol)),
        "kind": frontend.kind.value,
        "address": f"{_address(frontend.address)}:{frontend.port}",
    }


def _address(packed: bytes) -> str:
    return socket.inet_ntop(socket.AF_INET, packed) if len(packed) == 4 else f"[{socket.inet_ntop(socket.AF_INET6, packed)}]"
