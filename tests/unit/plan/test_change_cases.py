"""The case files of changes, in each back end: each state's packets by rules that were changed step by step, which are those
made from scratch, and by the oracle."""

from typing import Any

import pytest
from service_cases import feed
from service_checks import Objects, assert_kernel_does, assert_oracle_says
from service_histories import ChangeCase, load_change_cases, present
from simulated import BACK_ENDS

CASES = list(load_change_cases())


@pytest.mark.parametrize("back_end", BACK_ENDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_each_state_does_what_the_case_says(case: ChangeCase, back_end: str) -> None:
    kernel = BACK_ENDS[back_end](case.facts)
    seen: list[dict[str, Any]] = []
    for number, change in enumerate(case.changes):
        where = f"{case.name}, change {number}"
        for item in change.objects:
            feed(kernel, item, case.family)
        kernel.program()
        assert kernel.held() == kernel.desired(), where
        seen += change.objects
        anew, objects = BACK_ENDS[back_end](case.facts), Objects()
        for item in present(seen):
            feed(anew, item, case.family)
            feed(objects, item, case.family)
        anew.program()
        assert kernel.held() == anew.held(), where
        for packet in change.packets:
            assert_kernel_does(kernel.walk, packet.in_ipvs if back_end == "ipvs" else packet, case.facts, where)
            assert_oracle_says(objects.cluster(case.facts), packet)
