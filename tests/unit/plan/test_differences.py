"""What the log says of a repair: the sets and chains, and whose elements; never more than a few."""

from collections.abc import Iterable

from service_cases import FACTS, key, service_of, slices_of

from podwire.model.addr import Family
from podwire.model.nft import AddElements, AddTable, Batch, Command, DelElements, DelTable, Ruleset, SetRules, TableRef
from podwire.model.objects import EndpointSlice, Service
from podwire.plan.differences import chain_differences, nft_differences
from podwire.plan.iptables import Chains, IptablesPlanner
from podwire.plan.services import TABLE, ServicePlanner
from podwire.plan.services_maps import place_key
from podwire.plan.services_rules import sets_of

IPV4 = TableRef(Family.IPV4, TABLE)
SETS = sets_of(Family.IPV4)


def objects(name: str, number: int) -> tuple[Service, tuple[EndpointSlice, ...]]:
    short = {"name": name, "clusterIP": f"10.96.1.{number}", "ports": [{"port": 80, "targetPort": 8080}]}
    pieces = slices_of({"service": short, "endpoints": [{"ip": "10.244.1.2"}]}, Family.IPV4)
    return service_of(short, Family.IPV4), pieces


def planner(names: Iterable[str] = ("web",)) -> ServicePlanner:
    made = ServicePlanner(FACTS)
    for number, name in enumerate(names):
        made.set_service(key(name), *objects(name, number))
    return made


def differences(made: ServicePlanner, *damage: Command) -> list[str]:
    harmed = made.desired().apply(Batch(damage))
    return nft_differences(made.resync(harmed), made.owner_at)


def emptied(made: ServicePlanner, name: str) -> DelElements:
    held = made.desired().tables[IPV4].sets[name]
    return DelElements(IPV4, held.set, tuple((element, None) for element in held.elements))


def test_elements_are_named_by_set_and_service() -> None:
    made = planner()
    assert differences(made) == []
    assert differences(made, emptied(made, "endpoints")) == ["set ip podwire endpoints (shop/web)"]
    stray = AddElements(IPV4, SETS.services, ((place_key(bytes((10, 96, 0, 9)), 17, 53), None),))
    found = differences(made, emptied(made, "services"), SetRules(IPV4, "inside", ()), stray)
    assert set(found) == {"set ip podwire services (shop/web, nobody's 10.96.0.9 . udp . 53)", "chain ip podwire inside"}


def test_elements_that_are_no_frontends_are_shown() -> None:
    made = planner()
    found = differences(made, AddElements(IPV4, SETS.cluster_ips, ((bytes((10, 96, 0, 9)), None),)))
    assert found == ["set ip podwire cluster-ips (10.96.0.9)"]


def test_a_table_that_is_gone_or_switched_off_is_named_as_a_whole() -> None:
    made = planner()
    for harm in (DelTable(IPV4), AddTable(IPV4, dormant=True)):
        assert differences(made, harm) == ["table ip podwire"]


def test_few_are_named_of_many() -> None:
    made = planner(f"s{number}" for number in range(20))
    (found,) = differences(made, emptied(made, "endpoints"))
    assert found.startswith("set ip podwire endpoints (shop/s")
    assert found.endswith(", 17 more)")
    every = [emptied(made, name) for name, held in made.desired().tables[IPV4].sets.items() if held.elements]
    found_all = differences(made, *every, *(SetRules(IPV4, chain, ()) for chain in ("inside", "output", "postrouting")))
    assert len(found_all) == 6
    assert found_all[-1].endswith(" more")


def test_chains_of_iptables() -> None:
    made = IptablesPlanner(FACTS)
    made.set_service(key("web"), *objects("web", 1))
    desired = made.desired()
    assert chain_differences(made.resync(desired)) == []
    rules = dict(desired[Family.IPV4].rules)
    del rules["nat", "PODWIRE-INSIDE"]
    harmed = {**desired, Family.IPV4: Chains(rules, desired[Family.IPV4].jumps)}
    assert chain_differences(made.resync(harmed)) == ["chain iptables nat PODWIRE-INSIDE"]
    assert len(chain_differences(made.resync({}))) == 6


def test_nothing_of_a_first_load_is_looked_at() -> None:
    made = planner()
    assert nft_differences(made.resync(Ruleset()), made.owner_at) == ["table ip podwire", "table ip6 podwire"]
