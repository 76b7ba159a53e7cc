"""The case files of changes: each state's packets by rules that were changed step by step, by rules made from scratch, and by
the oracle."""

from typing import Any

import pytest
from service_cases import feed
from service_checks import Objects, assert_oracle_says, assert_rules_do
from service_histories import ChangeCase, load_change_cases, present

from podwire.model.nft import Ruleset
from podwire.plan.services import ServicePlanner

CASES = list(load_change_cases())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_each_state_does_what_the_case_says(case: ChangeCase) -> None:
    planner, ruleset = ServicePlanner(case.facts), Ruleset()
    seen: list[dict[str, Any]] = []
    for number, change in enumerate(case.changes):
        where = f"{case.name}, change {number}"
        for item in change.objects:
            feed(planner, item, case.family)
        ruleset = ruleset.apply(planner.take_batch())
        assert ruleset == planner.desired(), where
        seen += change.objects
        anew, objects = ServicePlanner(case.facts), Objects()
        for item in present(seen):
            feed(anew, item, case.family)
            feed(objects, item, case.family)
        for packet in change.packets:
            assert_rules_do(ruleset, packet, case.facts, where)
            assert_rules_do(anew.desired(), packet, case.facts, f"{where}, from scratch")
            assert_oracle_says(objects.cluster(case.facts), packet)
