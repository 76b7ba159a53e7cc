"""A proxy's metrics: kube-proxy's, under their names, types and labels, and our own.

Both families are one transaction here, so what kube-proxy measures for each is the same under both `ip_family`.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from podwire.agent.exposition import Histogram, Samples, exponential, family
from podwire.agent.proxymodes.port import RuleCount
from podwire.agent.rounds import Round, Versions
from podwire.client.informer import Change
from podwire.model.addr import Family, packed_family
from podwire.model.ids import ObjectKey
from podwire.model.objects import EndpointSlice, Service
from podwire.model.proxymode import ProxyMode
from podwire.model.servicetable import ServiceTable
from podwire.model.timestamps import parse_time

LAST_CHANGE = "endpoints.kubernetes.io/last-change-trigger-time"
_FAMILIES = tuple({"ip_family": of.value} for of in Family)
_SYNC_BOUNDS = exponential(0.001, 2, 15)
_PROGRAMMING_BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 3, 4, 5, 10, 20, 30, 60, 120, 300)
_RECONCILE_BOUNDS = exponential(0.001, 2, 15)


@dataclass(slots=True)
class ProxyMetrics:
    """Give every `Round` to `round`, and every change that is heard of to `service_heard` and `slice_heard` before.

    `started` and `wall` are seconds since the epoch; changes before the start are not counted as programmed late. `mode`: the
    one in use, or about to be."""

    wall: Callable[[], float]
    loop_time: Callable[[], float]
    mode: Callable[[], ProxyMode]
    started: float = field(init=False)
    tables: dict[ObjectKey, ServiceTable] = field(default_factory=dict)
    last_success: float = 0.0
    last_queued: float = 0.0
    healthz: Counter[int] = field(default_factory=Counter)
    livez: Counter[int] = field(default_factory=Counter)
    _sync: Histogram = field(default_factory=lambda: Histogram(_SYNC_BOUNDS))
    _full: Histogram = field(default_factory=lambda: Histogram(_SYNC_BOUNDS))
    _partial: Histogram = field(default_factory=lambda: Histogram(_SYNC_BOUNDS))
    _programming: Histogram = field(default_factory=lambda: Histogram(_PROGRAMMING_BOUNDS))
    _reconcile: Histogram = field(default_factory=lambda: Histogram(_RECONCILE_BOUNDS))
    _totals: Counter[str] = field(default_factory=Counter)
    _forgotten: Counter[Family] = field(default_factory=Counter)
    _triggers: dict[ObjectKey, float] = field(default_factory=dict)
    _pending_services: dict[ObjectKey, str] = field(default_factory=dict)
    """Those heard of and not programmed yet: the revision, "" for one that is gone."""
    _pending_slices: dict[ObjectKey, dict[ObjectKey, str]] = field(default_factory=dict)
    """The same, by Service."""

    def __post_init__(self) -> None:
        self.started = self.wall()

    def service_heard(self, change: Change[Service]) -> None:
        self._totals["service changes"] += 1
        self._pending_services[change.key] = change.new.metadata.resource_version if change.new else ""

    def slice_heard(self, change: Change[EndpointSlice]) -> None:
        self._totals["endpoint changes"] += 1
        if change.new is None:
            self._triggers.pop(change.key, None)
        for version in (change.old, change.new):
            if version is not None and version.service:
                of = ObjectKey(change.key.namespace, version.service)
                revision = version.metadata.resource_version if version is change.new else ""
                self._pending_slices.setdefault(of, {})[change.key] = revision

    def round(self, done: Round) -> None:
        """Take note of a round of `ServiceSync`."""
        now = self.wall()
        if done.error:
            self._totals["failures"] += 1
            return
        self.last_success = now
        self.last_queued = now - (self.loop_time() - done.queued)
        self._sync.observe(done.seconds)
        (self._full if done.full else self._partial).observe(done.seconds)
        self._reconcile.observe(done.forget_seconds)
        self._forgotten.update(done.forgotten)
        self._totals["commands"] += done.commands
        self._totals["repairs"] += done.repaired
        for key, served in done.changed.items():
            self._changed(key, served.service, served.table, served.slices, now)

    def _changed(
        self, key: ObjectKey, service: Service | None, table: ServiceTable, slices: Sequence[EndpointSlice], now: float
    ) -> None:
        if service is None:
            self.tables.pop(key, None)
        else:
            self.tables[key] = table
        self._settle(key, service, slices)
        for piece in slices:
            triggered = _triggered(piece)
            if triggered is None or triggered == self._triggers.get(piece.key):
                continue
            self._triggers[piece.key] = triggered
            if triggered >= self.started:
                self._programming.observe(max(0.0, now - triggered))

    def _settle(self, key: ObjectKey, service: Service | None, slices: Sequence[EndpointSlice]) -> None:
        """What was programmed is not pending any more, unless there is something newer."""
        if self._pending_services.get(key) == (service.metadata.resource_version if service else ""):
            del self._pending_services[key]
        programmed = {piece.key: piece.metadata.resource_version for piece in slices}
        pending = self._pending_slices.get(key, {})
        left = {name: revision for name, revision in pending.items() if programmed.get(name, "") != revision}
        if left:
            self._pending_slices[key] = left
        else:
            self._pending_slices.pop(key, None)

    @property
    def pending(self) -> tuple[int, int]:
        """Changes of Services, and of EndpointSlices, that are heard of and not programmed."""
        return len(self._pending_services), sum(map(len, self._pending_slices.values()))

    def no_local_endpoints(self) -> Counter[tuple[str, Family]]:
        """Frontends by the policy that leaves them without endpoints here, though there are some elsewhere."""
        found: Counter[tuple[str, Family]] = Counter()
        for table in self.tables.values():
            for frontend in table.frontends:
                of = packed_family(frontend.address)
                inside, outside = frontend.inside, frontend.outside
                found["internal", of] += not inside.backends and inside.drop
                found["external", of] += outside is not None and not outside.backends and outside.drop
        return found

    def text(self, repaired: Mapping[str, int], degraded: Mapping[str, str], acknowledged: Versions | None) -> str:
        """Everything but what is read from the kernel."""
        parts = (
            self._rounds(),
            self._changes(),
            self._failures(),
            self._serving(),
            self._ours(repaired, degraded, acknowledged),
        )
        return "".join(text for part in parts for text in part)

    def _rounds(self) -> Iterator[str]:
        name = "kubeproxy_sync_proxy_rules"
        for histogram, what, text in (
            (self._sync, "proxy_rules", "Time that a round of changes took."),
            (self._full, "full_proxy_rules", "Rounds that compared everything."),
            (self._partial, "partial_proxy_rules", "Rounds of what had changed."),
        ):
            yield histogram.text(f"kubeproxy_sync_{what}_duration_seconds", text, _FAMILIES)
        yield self._programming.text(
            "kubeproxy_network_programming_duration_seconds", "From the change of a pod or Service to the rules.", _FAMILIES
        )
        yield family(f"{name}_last_timestamp_seconds", "gauge", "When rules were last right.", _both(self.last_success))
        yield family(
            f"{name}_last_queued_timestamp_seconds", "gauge", "When the last change was heard of.", _both(self.last_queued)
        )

    def _changes(self) -> Iterator[str]:
        for what, pending in zip(("service", "endpoint"), self.pending, strict=True):
            name = f"kubeproxy_sync_proxy_rules_{what}_changes"
            yield family(f"{name}_pending", "gauge", "Changes that are not programmed yet.", [({}, pending)])
            yield family(f"{name}_total", "counter", "Changes that were heard of.", [({}, self._totals[f"{what} changes"])])

    def _failures(self) -> Iterator[str]:
        name, failures = "kubeproxy_sync_proxy_rules", _both(self._totals["failures"])
        if self.mode() is ProxyMode.NFTABLES:
            yield family(f"{name}_nftables_sync_failures_total", "counter", "Refused transactions.", failures)
            text = "Always 0: one transaction does both."
            yield family(f"{name}_nftables_cleanup_failures_total", "counter", text, _both(0))
        if self.mode() is ProxyMode.IPTABLES:
            yield family(f"{name}_iptables_restore_failures_total", "counter", "Refused iptables-restore.", failures)
            yield family(f"{name}_iptables_partial_restore_failures_total", "counter", "The same.", failures)

    def _serving(self) -> Iterator[str]:
        policies: Samples = [
            ({"ip_family": of.value, "traffic_policy": policy}, count)
            for (policy, of), count in sorted(
                self.no_local_endpoints().items(), key=lambda item: (item[0][0], item[0][1].value)
            )
        ]
        # kube-proxy's is a gauge too, whatever its name says.
        name = "kubeproxy_sync_proxy_rules_no_local_endpoints_total"
        yield family(name, "gauge", "Frontends without local endpoints, by policy.", policies)
        for probe, counts in (("healthz", self.healthz), ("livez", self.livez)):
            codes: Samples = [({"code": str(code)}, count) for code, count in sorted(counts.items())]
            yield family(f"kubeproxy_proxy_{probe}_total", "counter", f"Answers of /{probe} by status.", codes)
        name = "kubeproxy_conntrack_reconciler"
        yield self._reconcile.text(f"{name}_sync_duration_seconds", "Time to forget stale UDP flows.", _FAMILIES)
        forgotten: Samples = [({"ip_family": of.value}, self._forgotten[of]) for of in Family]
        yield family(f"{name}_deleted_entries_total", "counter", "Stale UDP flows.", forgotten)

    def _ours(self, repaired: Mapping[str, int], degraded: Mapping[str, str], acknowledged: Versions | None) -> Iterator[str]:
        name, total = "podwire_proxy", self._totals
        served = sum(bool(table.frontends) for table in self.tables.values())
        yield family(f"{name}_info", "gauge", "The back end in use, or about to be.", [({"mode": str(self.mode())}, 1)])
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


def _both(value: float) -> Samples:
    return [(labels, value) for labels in _FAMILIES]


def rule_counts(counts: Mapping[tuple[Family, str], RuleCount]) -> str:
    """How many iptables rules there are by family and table, and how many were written last."""
    name = "kubeproxy_sync_proxy_rules_iptables"
    labelled = [({"ip_family": of.value, "table": table}, count) for (of, table), count in counts.items()]
    total: Samples = [(labels, count.total) for labels, count in labelled]
    last: Samples = [(labels, count.last) for labels, count in labelled]
    return family(f"{name}_total", "gauge", "Rules of ours.", total) + family(
        f"{name}_last", "gauge", "Rules written last.", last
    )
