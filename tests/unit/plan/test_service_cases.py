"""The case files: objects → rules → what becomes of packets, by the evaluator."""

import pytest
from service_cases import FACTS, Case, Expectation, load_cases

from podwire.model.nft import Ruleset
from podwire.plan.services import ServicePlanner
from podwire.trace.netfilter import Fate, Machine, Result, follow

CASES = list(load_cases())


def outcomes(ruleset: Ruleset, expectation: Expectation) -> list[Result]:
    """The packet's fate for every number that `numgen` could draw."""
    sizes: list[int] = []

    def choose(n: int, draw: int) -> int:
        sizes.append(n)
        return draw % n

    results: list[Result] = []
    while not results or len(results) < max(sizes, default=1):
        draw = len(results)
        machine = Machine(frozenset(FACTS.node_ips), lambda n, draw=draw: choose(n, draw))  # type: ignore[misc]  # bound now
        results.append(follow(ruleset, expectation.packet, machine, locally_made=expectation.locally_made))
    return results


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_packets_go_where_the_case_says(case: Case) -> None:
    planner = ServicePlanner(FACTS)
    case.feed(planner)
    ruleset = Ruleset().apply(planner.take_batch())
    assert ruleset == planner.desired()
    for expectation in case.packets:
        results = outcomes(ruleset, expectation)
        why = f"{case.name}, {expectation.label}:\n" + "\n".join(str(step) for step in results[0].steps)
        assert {r.fate.value for r in results} == {expectation.fate}, why
        if expectation.fate == Fate.PASS.value:
            assert {(str(r.packet.dst), r.packet.dport) for r in results} == expectation.reaches, why
            sources = {"masqueraded" if r.masquerade else "kept" for r in results}
            assert not expectation.source or sources == {expectation.source}, why
