"""By which numbers clients are remembered: one for each pool of a Service's port, the same after every restart, never two."""

from dataclasses import replace
from typing import Any

import pytest
from service_cases import FACTS, key, service_of, slice_of

from podwire.model.addr import Family
from podwire.model.nft import (
    AddElements,
    Batch,
    DelElements,
    DelTable,
    FieldType,
    Prune,
    ReplaceElements,
    Ruleset,
    SetRules,
    SetState,
    TableRef,
)
from podwire.model.objects import EndpointSlice, Service
from podwire.plan.services import TABLE, ServicePlanner

IPV4 = TableRef(Family.IPV4, TABLE)
BACKEND_1, BACKEND_2, BACKEND_3 = (bytes((10, 244, n, 2)) + b"\x1f\x90\0\0" for n in (1, 2, 3))
ALIKE = ("s87884", "s174275")
"""Names of Services in `shop` whose numbers would be the same."""


Made = tuple[Service, tuple[EndpointSlice]]


def sticky(name: str = "web", last: int = 10, endpoints: tuple[int, ...] = (1, 2), **spec: Any) -> Made:
    """A Service at 10.96.0.<last> with an endpoint 10.244.<n>.2 on each node n<n>."""
    short = {
        "name": name,
        "clusterIP": f"10.96.0.{last}",
        "ports": [{"port": 80, "targetPort": 8080}],
        "sessionAffinity": "ClientIP",
        **spec,
    }
    found = [{"ip": f"10.244.{n}.2", "node": f"n{n}"} for n in endpoints]
    return service_of(short, Family.IPV4), (slice_of({"service": short, "endpoints": found}, Family.IPV4),)


def planner_of(*services: Made) -> ServicePlanner:
    planner = ServicePlanner(FACTS)
    for service, slices in services:
        planner.set_service(service.key, service, slices)
    return planner


def numbers(ruleset: Ruleset, name: str = "memories") -> list[bytes]:
    """By frontend, in order of their keys."""
    found = sorted(ruleset.tables[IPV4].sets[name].elements.items())
    return [data for _, data in found if isinstance(data, bytes)]


def members(ruleset: Ruleset) -> set[bytes]:
    return set(ruleset.tables[IPV4].sets["members"].elements)


def prunes(batch: Batch) -> list[Prune]:
    return [c for c in batch.commands if isinstance(c, Prune) and c.set.name == "affinity" and c.table == IPV4]


OUTSIDE: dict[str, Any] = {"externalIPs": ["203.0.113.9"]}
LOCAL: dict[str, Any] = {
    "type": "LoadBalancer",
    "externalTrafficPolicy": "Local",
    "ingress": [{"ip": "203.0.113.1"}],
    "externalIPs": ["203.0.113.9"],
    "ports": [{"port": 80, "targetPort": 8080, "nodePort": 30080}],
}


def test_a_port_has_one_number_at_all_of_its_addresses_and_another_for_policy_local() -> None:
    ruleset = planner_of(sticky(**LOCAL)).desired()
    mine, other = set(numbers(ruleset)), set(numbers(ruleset, "other-memories"))
    assert len(mine) == len(other) == 1
    assert mine != other
    assert len(numbers(ruleset)) == len(numbers(ruleset, "other-memories")) == 4
    everyone, here = {BACKEND_1, BACKEND_2}, {BACKEND_1}
    expected = {number + backend for (number,), pool in ((mine, everyone), (other, here)) for backend in pool}
    assert members(ruleset) == expected, "whom each may hold"


def test_where_policy_local_has_nobody_there_is_one_memory() -> None:
    ruleset = planner_of(sticky(endpoints=(2, 3), **LOCAL)).desired()
    assert not numbers(ruleset, "other-memories")
    assert members(ruleset) == {numbers(ruleset)[0] + backend for backend in (BACKEND_2, BACKEND_3)}


def test_the_number_does_not_depend_on_what_else_there_is_nor_on_when() -> None:
    several = planner_of(*(sticky(f"s{n}", 20 + n) for n in range(5)), sticky())
    assert numbers(planner_of(sticky()).desired())[0] == numbers(several.desired())[0]
    service, _ = sticky()
    several.set_service(service.key, None)
    several.take_batch()
    several.set_service(*_fed(sticky(endpoints=(3,))))
    assert numbers(planner_of(sticky()).desired())[0] == numbers(several.desired())[0]


def _fed(made: Made) -> tuple[Any, ...]:
    return made[0].key, *made


def test_services_whose_numbers_would_be_the_same_have_two() -> None:
    first, second = (sticky(name, 10 + n) for n, name in enumerate(ALIKE))
    assert numbers(planner_of(first).desired()) == numbers(planner_of(second).desired())
    assert len(set(numbers(planner_of(first, second).desired()))) == 2


def test_after_a_restart_nothing_is_read_under_the_number_of_another() -> None:
    """The two would have the same number; who came first has it, and that may be the other one after a restart."""
    first, second = (sticky(name, 10 + n) for n, name in enumerate(ALIKE))
    before = Ruleset().apply(planner_of(first, second).take_batch())
    one, other = numbers(before)
    again = planner_of(second, first)
    batch = again.resync(before)
    assert numbers(before.apply(batch)) == [other, one] == numbers(again.desired())
    (prune,) = prunes(batch)
    assert prune.others
    assert prune.keep == {one: frozenset(), other: frozenset()}


def test_after_a_restart_those_who_are_known_stay_known() -> None:
    before = Ruleset().apply(planner_of(sticky(), sticky("gone", 11)).take_batch())
    web, gone = numbers(before)
    batch = planner_of(sticky(endpoints=(2, 3))).resync(before)
    assert numbers(before.apply(batch)) == [web]
    (prune,) = prunes(batch)
    client, left, stays = bytes(4), BACKEND_1, BACKEND_2
    assert prune.unwanted(client + web, left, prune.part_length)
    assert not prune.unwanted(client + web, stays, prune.part_length)
    assert prune.unwanted(client + gone, stays, prune.part_length)


def test_what_is_remembered_of_whom_left_is_looked_for_where_it_may_have_stayed() -> None:
    """The rules are right, but who made them so may have ended before it took away what packets had left."""
    planner = planner_of(sticky())
    kernel = Ruleset().apply(planner.take_batch())
    planner.set_service(*_fed(sticky(endpoints=(2,))))
    kernel = kernel.apply(planner.take_batch())
    for after in (planner, planner_of(sticky(endpoints=(2,)))):
        assert not after.resync(kernel), "a comparison that finds nothing looks at no memory"
        batch = after.resync(kernel, leavings=True)
        assert all(isinstance(command, Prune) for command in batch.commands)
        (prune,) = prunes(batch)
        (web,) = numbers(kernel)
        assert prune.unwanted(bytes(4) + web, BACKEND_1, prune.part_length)
        assert not prune.unwanted(bytes(4) + web, BACKEND_2, prune.part_length)


def test_a_table_that_knew_strangers_is_changed_in_place() -> None:
    planner = planner_of(sticky(**LOCAL))
    ours = Ruleset().apply(planner.take_batch())
    table = ours.tables[IPV4]
    strangers = replace(table.sets["members"].set, name="strangers")
    sets = {name: state for name, state in table.sets.items() if name != "members"}
    older = Ruleset({**ours.tables, IPV4: replace(table, sets={**sets, "strangers": SetState(strangers)})})
    batch = planner.resync(older)
    assert not [c for c in batch.commands if isinstance(c, DelTable)]
    assert older.apply(batch) == ours


def test_a_number_that_others_gave_to_an_address_is_taken_back_and_its_memory_not_trusted() -> None:
    planner = planner_of(sticky(), sticky("api", 11))
    ours = Ruleset().apply(planner.take_batch())
    memories = ours.tables[IPV4].sets["memories"]
    web, api = sorted(memories.elements)
    of_web, of_api = (data for _, data in sorted(memories.elements.items()))
    theirs = ours.apply(Batch((ReplaceElements(IPV4, memories.set, ((web, of_api), (api, of_web))),)))
    batch = planner.resync(theirs)
    assert theirs.apply(batch) == ours
    (prune,) = prunes(batch)
    assert prune.keep == dict.fromkeys(numbers(ours), frozenset())


def test_a_table_that_remembers_by_address_is_made_anew() -> None:
    planner = planner_of(sticky())
    ours = Ruleset().apply(planner.take_batch())
    table = ours.tables[IPV4]
    by_address = replace(table.sets["affinity"].set, key=(FieldType.IPV4, *table.sets["services"].set.key))
    older = Ruleset({**ours.tables, IPV4: replace(table, sets={**table.sets, "affinity": SetState(by_address)})})
    batch = planner.resync(older)
    assert [c for c in batch.commands if isinstance(c, DelTable)] == [DelTable(IPV4)]
    assert older.apply(batch) == ours


@pytest.mark.parametrize("at_once", [False, True])
def test_two_services_exchange_an_address(at_once: bool) -> None:
    planner = planner_of(sticky(**OUTSIDE), sticky("api", 11))
    kernel = Ruleset().apply(planner.take_batch())
    for made in (sticky(), sticky("api", 11, **OUTSIDE)):
        planner.set_service(*_fed(made))
        if not at_once:
            kernel = kernel.apply(planner.take_batch())
    kernel = kernel.apply(planner.take_batch())
    of_web, of_api, of_outside = numbers(kernel)
    assert of_web != of_api == of_outside
    assert kernel == planner.desired() == planner_of(sticky(), sticky("api", 11, **OUTSIDE)).desired()


def test_an_address_that_another_service_wins_is_remembered_by_that_ones_number() -> None:
    """Both lead to the same backends, so nothing else about the address changes."""
    planner = planner_of(sticky("a", 10, **OUTSIDE), sticky("b", 11, **OUTSIDE))
    kernel = Ruleset().apply(planner.take_batch())
    of_a, of_b, of_outside = numbers(kernel)
    assert of_outside == of_a != of_b
    planner.set_service(key("a"), None)
    kernel = kernel.apply(planner.take_batch())
    assert numbers(kernel) == [of_b, of_b]


def test_affinity_switched_off_at_one_service_leaves_the_others() -> None:
    planner = planner_of(sticky(), sticky("api", 11))
    kernel = Ruleset().apply(planner.take_batch())
    of_web, of_api = numbers(kernel)
    planner.set_service(*_fed(sticky(sessionAffinity="None")))
    batch = planner.take_batch()
    assert numbers(kernel.apply(batch)) == [of_api]
    (prune,) = prunes(batch)
    assert prune.keep == {of_web: frozenset()}


@pytest.mark.parametrize("others", [10, 400])
def test_a_change_costs_what_it_is_whatever_else_there_is(others: int) -> None:
    spec = {**LOCAL, "ingress": [], "externalIPs": []}
    planner = planner_of(sticky(**spec), *(sticky(f"s{n}", clusterIP=f"10.96.{1 + n // 250}.{n % 250}") for n in range(others)))
    kernel = Ruleset().apply(planner.take_batch())
    planner.set_service(*_fed(sticky(endpoints=(1, 2, 3), **spec)))
    batch = planner.take_batch()
    assert not [c for c in batch.commands if isinstance(c, SetRules)]
    touched = [
        (c.set.name, len(c.elements)) for c in batch.commands if isinstance(c, AddElements | ReplaceElements | DelElements)
    ]
    # The backend at each of two addresses, how many they have, and that it may be remembered.
    assert sorted(touched) == [("endpoints", 2), ("members", 1), ("pools", 2)]
    assert kernel.apply(batch) == planner.desired()
