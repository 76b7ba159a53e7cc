"""A proxy's metrics have the names, types and labels of kube-proxy 1.34's, and count what they say."""

import re
from datetime import UTC, datetime

import msgspec
import pytest

from podwire.agent.proxy.metrics import LAST_CHANGE, ProxyMetrics, rule_counts
from podwire.agent.proxymodes.port import RuleCount
from podwire.agent.rounds import Round, Served, Versions
from podwire.client.informer import Change
from podwire.model.addr import Family
from podwire.model.ids import ObjectKey
from podwire.model.meta import ObjectMeta
from podwire.model.objects import EndpointSlice, Service
from podwire.model.proxymode import ProxyMode
from podwire.model.servicetable import Frontend, FrontendKind, Pool, ServiceTable
from podwire.model.timestamps import format_time

# From Kubernetes' reference of metrics (instrumentation/metrics): name → type, labels.
KUBE_PROXYS = {
    "conntrack_reconciler_deleted_entries_total": ("counter", {"ip_family"}),
    "conntrack_reconciler_sync_duration_seconds": ("histogram", {"ip_family"}),
    "network_programming_duration_seconds": ("histogram", {"ip_family"}),
    "proxy_healthz_total": ("counter", {"code"}),
    "proxy_livez_total": ("counter", {"code"}),
    "sync_full_proxy_rules_duration_seconds": ("histogram", {"ip_family"}),
    "sync_partial_proxy_rules_duration_seconds": ("histogram", {"ip_family"}),
    "sync_proxy_rules_duration_seconds": ("histogram", {"ip_family"}),
    "sync_proxy_rules_endpoint_changes_pending": ("gauge", set()),
    "sync_proxy_rules_endpoint_changes_total": ("counter", set()),
    "sync_proxy_rules_last_queued_timestamp_seconds": ("gauge", {"ip_family"}),
    "sync_proxy_rules_last_timestamp_seconds": ("gauge", {"ip_family"}),
    "sync_proxy_rules_no_local_endpoints_total": ("gauge", {"ip_family", "traffic_policy"}),
    "sync_proxy_rules_service_changes_pending": ("gauge", set()),
    "sync_proxy_rules_service_changes_total": ("counter", set()),
}
BY_MODE = {
    ProxyMode.NFTABLES: {
        "sync_proxy_rules_nftables_cleanup_failures_total": ("counter", {"ip_family"}),
        "sync_proxy_rules_nftables_sync_failures_total": ("counter", {"ip_family"}),
    },
    ProxyMode.IPTABLES: {
        "sync_proxy_rules_iptables_last": ("gauge", {"ip_family", "table"}),
        "sync_proxy_rules_iptables_partial_restore_failures_total": ("counter", {"ip_family"}),
        "sync_proxy_rules_iptables_restore_failures_total": ("counter", {"ip_family"}),
        "sync_proxy_rules_iptables_total": ("gauge", {"ip_family", "table"}),
    },
    ProxyMode.IPVS: {},
}
WEB = ObjectKey("default", "web")


def metrics(mode: ProxyMode = ProxyMode.NFTABLES) -> ProxyMetrics:
    return ProxyMetrics(wall=lambda: 1000.0, loop_time=lambda: 5.0, mode=lambda: mode)


def text_of(found: ProxyMetrics) -> str:
    return found.text({}, {}, None)


@pytest.mark.parametrize("mode", ProxyMode)
def test_names_types_and_labels(mode: ProxyMode) -> None:
    found = metrics(mode)
    found.healthz[200] += 1
    found.livez[200] += 1
    drop = Frontend(bytes(4), 6, 80, FrontendKind.CLUSTER_IP, Pool(drop=True))
    found.round(Round(changed={WEB: Served(service(1), (), ServiceTable((drop,)))}, full=True, seconds=0.1, queued=4.0))
    text = text_of(found)
    if mode is ProxyMode.IPTABLES:
        text += rule_counts({(Family.IPV4, "nat"): RuleCount(7, 2)})
    seen = {}
    for name, kind in re.findall(r"^# TYPE kubeproxy_(\S+) (\S+)$", text, re.MULTILINE):
        samples = re.findall(rf"^kubeproxy_{name}(?:_bucket|_sum|_count)?(?:{{(.*)}})? \S+$", text, re.MULTILINE)
        labels = {label for sample in samples for label in re.findall(r'(\w+)="', sample)} - {"le"}
        seen[name] = (kind, labels)
    assert seen == KUBE_PROXYS | BY_MODE[mode]


def service(revision: int) -> Service:
    return Service(metadata=ObjectMeta(name="web", namespace="default", resource_version=str(revision)))


def piece(revision: int, name: str = "web-1", of: str = "web") -> EndpointSlice:
    labels = {"kubernetes.io/service-name": of}
    return EndpointSlice(
        metadata=ObjectMeta(name=name, namespace="default", labels=labels, resource_version=str(revision)), address_type="IPv4"
    )


def programmed(found: ProxyMetrics, subject: Service | None, *slices: EndpointSlice, key: ObjectKey = WEB) -> None:
    changed = {key: Served(subject, slices, ServiceTable())}
    found.round(Round(changed=changed, full=False, seconds=0.1, queued=4.0))


def heard(found: ProxyMetrics, old: EndpointSlice | None, new: EndpointSlice | None) -> None:
    change = Change(ObjectKey("default", (new or old or piece(0)).metadata.name), old, new)
    found.slice_heard(change)


def test_changes_are_pending_until_they_are_programmed() -> None:
    found = metrics()
    found.service_heard(Change(WEB, None, service(1)))
    heard(found, None, piece(2))
    heard(found, None, piece(3, "web-2"))
    assert found.pending == (1, 2)
    assert "kubeproxy_sync_proxy_rules_endpoint_changes_pending 2" in text_of(found)
    found.service_heard(Change(WEB, service(1), service(4)))  # comes while the round runs
    programmed(found, service(1), piece(2), piece(3, "web-2"))
    assert found.pending == (1, 0)
    programmed(found, service(4), piece(2), piece(3, "web-2"))
    assert found.pending == (0, 0)
    text = text_of(found)
    assert "kubeproxy_sync_proxy_rules_service_changes_total 2" in text
    assert "kubeproxy_sync_proxy_rules_endpoint_changes_total 2" in text


def test_of_two_slices_the_newer_one_stays_pending() -> None:
    found = metrics()
    heard(found, None, piece(2))
    heard(found, None, piece(3, "web-2"))
    programmed(found, service(1), piece(2))
    assert found.pending == (0, 1)
    programmed(found, service(1), piece(2), piece(3, "web-2"))
    assert found.pending == (0, 0)


def test_programming_is_timed_from_the_change_that_led_to_it_once() -> None:
    now = 1000.0
    found = ProxyMetrics(wall=lambda: now, loop_time=lambda: 5.0, mode=lambda: ProxyMode.NFTABLES)

    def changed(at: float) -> EndpointSlice:
        trigger = {LAST_CHANGE: format_time(datetime.fromtimestamp(at, UTC))}
        return msgspec.structs.replace(piece(2), metadata=msgspec.structs.replace(piece(2).metadata, annotations=trigger))

    def seen() -> list[str]:
        name = "kubeproxy_network_programming_duration_seconds"
        return re.findall(rf'^{name}_(?:sum|count){{ip_family="IPv4"}} (\S+)$', text_of(found), re.MULTILINE)

    programmed(found, service(1), changed(999.0), piece(3, "web-2"))
    assert seen() == ["0", "0"], "from before the start"
    now = 1004.5
    for _ in range(2):
        programmed(found, service(1), changed(1003.0))
        assert seen() == ["1.5", "1"]
    heard(found, changed(1003.0), None)
    programmed(found, service(1), changed(1003.0))
    assert seen() == ["3", "2"], "one of that name that is made again is another"
    programmed(found, service(1), changed(1006.0))
    assert seen() == ["3", "3"], "clocks that disagree"


def test_what_is_counted_of_our_own() -> None:
    found = metrics()
    reached = Frontend(bytes(4), 6, 80, FrontendKind.CLUSTER_IP, Pool())
    changed = {
        WEB: Served(service(1), (), ServiceTable((reached,))),
        ObjectKey("a", "b"): Served(service(1), (), ServiceTable()),
    }
    found.round(Round(changed=changed, full=True, seconds=0.1, queued=4.0, commands=7, repaired=True))
    found.round(Round(changed={}, full=False, seconds=0.1, queued=4.0, commands=2))
    text = found.text({"rules": 2}, {"conntrack": "refused"}, Versions("12", "not-a-number"))
    for line in (
        "podwire_proxy_services 1",
        "podwire_proxy_commands_total 9",
        "podwire_proxy_repairs_total 1",
        'podwire_proxy_repaired_total{kind="rules"} 2',
        'podwire_proxy_degraded{subject="conntrack"} 1',
        'podwire_proxy_programmed_resource_version{resource="services"} 12',
        'kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds{ip_family="IPv4"} 999',
        'kubeproxy_sync_proxy_rules_last_timestamp_seconds{ip_family="IPv6"} 1000',
    ):
        assert f"{line}\n" in text
    assert 'resource="endpointslices"' not in text


def test_frontends_that_a_policy_leaves_without_endpoints() -> None:
    found = metrics()
    some, none = Pool((bytes(8),)), Pool(drop=True)
    six = Frontend(bytes(16), 6, 80, FrontendKind.CLUSTER_IP, none)
    node_port = Frontend(bytes(4), 6, 80, FrontendKind.NODE_PORT, some, outside=none)
    refused = Frontend(bytes(4), 6, 81, FrontendKind.NODE_PORT, Pool(), outside=Pool())
    table = ServiceTable((six, node_port, refused))
    found.round(Round(changed={WEB: Served(service(1), (), table)}, full=True, seconds=0.1, queued=4.0))
    assert {k: n for k, n in found.no_local_endpoints().items() if n} == {
        ("internal", Family.IPV6): 1,
        ("external", Family.IPV4): 1,
    }


def test_what_goes_is_a_change_too() -> None:
    found = metrics()
    programmed(found, service(1), piece(2))
    found.service_heard(Change(WEB, service(1), None))
    heard(found, piece(2), None)
    assert found.pending == (1, 1)
    programmed(found, None)
    assert found.pending == (0, 0)


def test_a_slice_that_moves_concerns_both_services() -> None:
    found = metrics()
    heard(found, piece(2), piece(3, of="shop"))
    assert found.pending == (0, 2)
    programmed(found, service(1))
    assert found.pending == (0, 1)
    programmed(found, service(1), piece(3, of="shop"), key=ObjectKey("default", "shop"))
    assert found.pending == (0, 0)


def test_a_failure_leaves_them_pending() -> None:
    found = metrics()
    found.service_heard(Change(WEB, None, service(1)))
    found.round(Round(changed={}, full=True, seconds=0.0, queued=4.0, error="refused"))
    assert found.pending == (1, 0)


def test_forgotten_flows_are_counted_by_family() -> None:
    found = metrics()
    for _ in range(2):
        found.round(Round(changed={}, full=False, seconds=0.1, queued=4.0, forgotten={Family.IPV6: 2}))
    name = "kubeproxy_conntrack_reconciler_deleted_entries_total"
    assert f'{name}{{ip_family="IPv4"}} 0' in text_of(found)
    assert f'{name}{{ip_family="IPv6"}} 4' in text_of(found)
