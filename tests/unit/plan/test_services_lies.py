"""A proof that nothing can fail proves nothing: planners that are told lies, and kernels that lose something, are found out."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
from service_cases import FACTS, service_of, slice_of
from service_worlds import some_clusters
from simulated import BACK_ENDS, Simulated, SimulatedIptables, SimulatedIpvs, SimulatedNft, broken_promises, serving

from podwire.model.addr import Family
from podwire.model.ipvs import VirtualKey, VirtualServer
from podwire.model.nft import Ruleset, TableState
from podwire.plan.iptables import Chains
from podwire.plan.iptables_rules import HOOKS, chain
from podwire.trace.oracle import Cluster

pytestmark = pytest.mark.timeout(120)


@lru_cache(maxsize=1)
def enough() -> tuple[Cluster, ...]:
    """One of them finds out. The first has what is rare by chance: endpoints that are all elsewhere, and a policy of Local."""
    ports = [{"port": 80, "targetPort": 8080, "nodePort": 30080}]
    web = {"name": "web", "type": "NodePort", "clusterIP": "10.96.0.10", "externalTrafficPolicy": "Local", "ports": ports}
    elsewhere = slice_of({"service": web, "endpoints": [{"ip": "10.244.2.2", "node": "n2"}]}, Family.IPV4)
    first = Cluster(FACTS, ((service_of(web, Family.IPV4), (elsewhere,)),))
    return (first, *some_clusters(Family.IPV4, 120))


Wrong = Callable[[Cluster], Simulated | None]
"""The kernel that serves the cluster wrongly; None: nothing is wrong with it."""


def found_out(wrong: Wrong) -> bool:
    """Whether a cluster meets something else than it is promised."""
    kernels = ((cluster, wrong(cluster)) for cluster in enough())
    return any(any(broken_promises(kernel, cluster)) for cluster, kernel in kernels if kernel is not None)


LIES: dict[str, dict[str, Any]] = {
    "no pod is of this node": {"pod_cidrs": ()},
    "another node": {"name": "n2"},
    "another zone": {"zone": "z4"},
    "everyone is masqueraded": {"masquerade_all": True},
    "no address": {"node_ips": ()},
    "no Service range": {"service_cidrs": ()},
}


@pytest.mark.parametrize("back_end", BACK_ENDS)
@pytest.mark.parametrize("lie", LIES.values(), ids=list(LIES))
def test_a_planner_that_is_told_lies(back_end: str, lie: dict[str, Any]) -> None:
    def wrong(cluster: Cluster) -> Simulated | None:
        told = serving(back_end, replace(cluster, node=replace(cluster.node, **lie)))
        return None if told.held() == serving(back_end, cluster).held() else told

    assert found_out(wrong)


# --- nftables -----------------------------------------------------------------------------------------------------------

SETS = (
    "services", "outside", "pools", "local-pools", "endpoints", "local-endpoints", "sticky", "memories", "other-memories",
    "members", "masquerade", "keep-source", "cluster-ips", "hairpin", "restricted", "source-ranges",
)  # fmt: skip


def without_elements(ruleset: Ruleset, name: str) -> Ruleset:
    def emptied(table: TableState) -> TableState:
        return replace(table, sets={**table.sets, name: replace(table.sets[name], elements={}, comments={})})

    return Ruleset({ref: emptied(table) for ref, table in ruleset.tables.items()})


def without_chain(ruleset: Ruleset, name: str) -> Ruleset:
    def rest(table: TableState) -> TableState:
        return replace(table, chains={n: state for n, state in table.chains.items() if n != name})

    return Ruleset({ref: rest(table) for ref, table in ruleset.tables.items()})


def with_rules(lose: Callable[[Ruleset], Ruleset]) -> Wrong:
    def wrong(cluster: Cluster) -> Simulated | None:
        made = serving("nftables", cluster)
        assert isinstance(made, SimulatedNft)
        whole, made.kernel = made.kernel, lose(made.kernel)
        return made if made.kernel != whole else None

    return wrong


@pytest.mark.parametrize("name", SETS)
def test_elements_lost(name: str) -> None:
    assert found_out(with_rules(lambda ruleset: without_elements(ruleset, name)))


def test_clients_not_noted_on_the_way_to_the_node_itself() -> None:
    assert found_out(with_rules(lambda ruleset: without_chain(ruleset, "input")))


def test_a_number_left_on_a_packet() -> None:
    def lose(ruleset: Ruleset) -> Ruleset:
        def of(table: TableState) -> TableState:
            remember = table.chains["remember-for"]
            return replace(table, chains={**table.chains, "remember-for": replace(remember, rules=remember.rules[:-1])})

        return Ruleset({ref: of(table) for ref, table in ruleset.tables.items()})

    assert found_out(with_rules(lose))


# --- iptables -----------------------------------------------------------------------------------------------------------


def with_chains(lose: Callable[[Chains], Chains]) -> Wrong:
    def wrong(cluster: Cluster) -> Simulated | None:
        made = serving("iptables", cluster)
        assert isinstance(made, SimulatedIptables)
        whole = dict(made.kernel)
        made.kernel = {family: lose(chains) for family, chains in whole.items()}
        return made if made.kernel != whole else None

    return wrong


@pytest.mark.parametrize(("table", "hook"), [(table, hook) for table, hooks in HOOKS.items() for hook, *_ in hooks])
def test_a_jump_lost(table: str, hook: str) -> None:
    assert found_out(with_chains(lambda c: replace(c, jumps={ref: j for ref, j in c.jumps.items() if ref != (table, hook)})))


@pytest.mark.parametrize(
    "name",
    [
        "PREROUTING", "OUTPUT", "POSTROUTING", "INSIDE", "OUTSIDE", "I-", "O-", "SVC-", "EXT-", "SEP-", "REWRITTEN", "HAIRPIN",
        "MASQUERADE", "MARK-OTHERS", "MARK-LOCAL", "LEAVING", "INPUT", "FORWARD", "FILTER", "F-INSIDE", "F-OUT", "F-IN", "FI-",
        "FO-", "REFUSE",
    ],
)  # fmt: skip
def test_rules_lost(name: str) -> None:
    def emptied(chains: Chains) -> Chains:
        def of(ref: tuple[str, str]) -> bool:
            return ref[1].startswith(chain(name)) if name.endswith("-") else ref[1] == chain(name)

        return replace(chains, rules={ref: () if of(ref) else lines for ref, lines in chains.rules.items()})

    assert found_out(with_chains(emptied))


# --- ipvs ---------------------------------------------------------------------------------------------------------------

FOR_IPVS = ("local-endpoints", "other-memories")
"""Clients outside of a policy of Local are IPVS' to serve and to remember."""
Servers = Mapping[VirtualKey, VirtualServer]


def with_node(lose: Callable[[SimulatedIpvs], object]) -> Wrong:
    def wrong(cluster: Cluster) -> Simulated | None:
        made = serving("ipvs", cluster)
        assert isinstance(made, SimulatedIpvs)
        whole = made.kernel
        lose(made)
        return made if made.kernel != whole else None

    return wrong


@pytest.mark.parametrize("name", [name for name in SETS if name not in FOR_IPVS])
def test_elements_beside_ipvs_lost(name: str) -> None:
    def lose(made: SimulatedIpvs) -> None:
        made.kernel = replace(made.kernel, rules=without_elements(made.kernel.rules, name))

    assert found_out(with_node(lose))


def test_an_address_of_ipvs_lost() -> None:
    def lose(made: SimulatedIpvs) -> None:
        made.kernel = replace(made.kernel, bound=frozenset(sorted(made.kernel.bound)[1:]))

    assert found_out(with_node(lose))


def with_servers(
    lose: Callable[[Servers], Iterable[tuple[VirtualKey, VirtualServer]]],
) -> Wrong:
    def change(made: SimulatedIpvs) -> None:
        made.kernel = replace(made.kernel, servers=dict(lose(made.kernel.servers)))

    return with_node(change)


def test_a_virtual_server_lost() -> None:
    assert found_out(with_servers(lambda servers: sorted(servers.items())[1:]))


def test_a_real_server_lost() -> None:
    def lose(servers: Servers) -> Iterable[tuple[VirtualKey, VirtualServer]]:
        for key, server in servers.items():
            yield key, replace(server, servers=dict(sorted(server.servers.items())[1:]))

    assert found_out(with_servers(lose))


def test_a_real_server_of_weight_0() -> None:
    def lose(servers: Servers) -> Iterable[tuple[VirtualKey, VirtualServer]]:
        for key, server in servers.items():
            yield key, replace(server, servers={**server.servers, min(server.servers): 0})

    assert found_out(with_servers(lose))


def test_persistence_lost() -> None:
    assert found_out(with_servers(lambda servers: [(key, replace(s, persistence_s=0)) for key, s in servers.items()]))
