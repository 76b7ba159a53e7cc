"""Faults as values: who may hear whom, and the rules that see to it."""

import pytest

from podwire.lab.faults import TABLE, Fault, FaultKind, amount, cut_off, plan_rules
from podwire.lab.spec import LabSpec
from podwire.lab.topology import Topology
from podwire.model.addr import Family
from podwire.model.errors import InvalidInput
from podwire.model.nft import Ruleset, TableRef

SPEC = LabSpec()
TOPOLOGY = Topology(SPEC.families, SPEC.balancer_pools)
EVERYBODY = ("world", "balancer", "node-1", "node-2", "node-3")


def test_a_partition_cuts_both_ways() -> None:
    faults = [Fault(FaultKind.PARTITION, ("node-1",), ("node-2", "world"))]
    assert {place: set(cut_off(place, faults, EVERYBODY)) for place in EVERYBODY} == {
        "node-1": {"node-2", "world"},
        "node-2": {"node-1"},
        "world": {"node-1"},
        "node-3": set(),
        "balancer": set(),
    }


def test_a_partition_from_everybody_leaves_its_own_side_together() -> None:
    faults = [Fault(FaultKind.PARTITION, ("node-1", "node-2"))]
    assert cut_off("node-1", faults, EVERYBODY) == {"world", "balancer", "node-3"}
    assert cut_off("node-3", faults, EVERYBODY) == {"node-1", "node-2"}


def test_the_largest_loss_counts() -> None:
    faults = [Fault(FaultKind.DROP, ("node-1",), amount=5), Fault(FaultKind.DROP, ("node-1", "node-2"), amount=20)]
    assert [amount(FaultKind.DROP, place, faults) for place in EVERYBODY] == [0, 0, 20, 20, 0]


def test_rules_say_why_they_drop_and_go_when_healed() -> None:
    place, other = TOPOLOGY.node(1), TOPOLOGY.node(2)
    broken = Ruleset().apply(plan_rules(place, [other], 12.5))
    for family in Family:
        table = broken.tables[TableRef(family, TABLE)]
        assert [rule.comment for rule in table.chains["arriving"].rules] == ["cut off from node-2", "12.5 % are lost"]
        assert len(table.sets["lost"].elements) == 125
    assert broken.apply(plan_rules(place, [], 0)) == Ruleset()


@pytest.mark.parametrize(
    "document",
    [
        {"kind": "earthquake", "places": ["node-1"]},
        {"kind": "stop", "places": []},
        {"kind": "drop", "places": ["node-1"], "amount": 101},
        {"kind": "drop", "places": ["node-1"]},
        {"kind": "delay", "places": ["node-1"], "amount": -1},
        {"places": ["node-1"]},
        {"kind": "partition", "places": ["node-1", "node-2"], "others": ["node-2"]},
    ],
)
def test_what_is_no_fault_is_refused(document: dict[str, object]) -> None:
    with pytest.raises(InvalidInput):
        Fault.from_json(document)


@pytest.mark.parametrize("fault", [Fault(FaultKind.PARTITION, ("a",), ("b",)), Fault(FaultKind.DROP, ("a",), amount=1.5)])
def test_json_keeps_all(fault: Fault) -> None:
    assert Fault.from_json(fault.to_json()) == fault


def test_neighbours_of_the_fabric_are_introduced_once() -> None:
    """All that are there, and then each new one with those before it, is the same as all at once."""
    places = tuple(TOPOLOGY.node(index) for index in range(1, 6))
    at_once = TOPOLOGY.plan_neighbours(places, places)
    by_and_by = TOPOLOGY.plan_neighbours(places[:2], places[:2]) + TOPOLOGY.plan_neighbours(places[2:], places)
    assert len(at_once) == 5 * 4 * 2
    assert set(by_and_by) == set(at_once)
    assert len(by_and_by) == len(at_once)
