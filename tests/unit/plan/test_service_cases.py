"""The case files: objects → rules → what becomes of packets, by the evaluator; and the same asked of the oracle."""

import pytest
from service_cases import Case, Story, load_cases, load_stories
from service_checks import Objects, assert_oracle_says, assert_rules_do
from service_worlds import pruned

from podwire.model.nft import Ruleset
from podwire.plan.services import ServicePlanner
from podwire.trace.journey import Fate, Learned, Machine
from podwire.trace.netfilter import follow

CASES = list(load_cases(special=True))
STORIES = list(load_stories())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_packets_go_where_the_case_says(case: Case) -> None:
    planner = ServicePlanner(case.facts)
    case.feed(planner)
    ruleset = Ruleset().apply(planner.take_batch())
    assert ruleset == planner.desired()
    for expectation in case.packets:
        assert_rules_do(ruleset, expectation, case.facts, case.name)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_oracle_promises_what_the_case_says(case: Case) -> None:
    objects = Objects()
    case.feed(objects)
    for expectation in case.packets:
        assert_oracle_says(objects.cluster(case.facts), expectation)


# --- sequences of packets and changes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.name)
def test_clients_are_remembered_as_the_story_says(story: Story) -> None:
    """The rules' memory is that of the kernel: what a packet leaves in a dynamic set stays until it is pruned."""
    planner = ServicePlanner(story.facts)
    ruleset = Ruleset()
    learned: Learned = {}
    for number, (objects, expectation, draw) in enumerate(story.steps):
        for item in objects:
            story.feed_one(planner, item)
        batch = planner.take_batch()
        ruleset = ruleset.apply(batch)
        learned = pruned(learned, batch)
        if expectation is None:
            continue
        machine = Machine(frozenset(story.facts.node_ips), lambda n, draw=draw: draw % n, learned)  # type: ignore[misc]  # bound now
        result = follow(ruleset, expectation.packet, machine, locally_made=expectation.locally_made)
        why = f"{story.name}, step {number}: {expectation.label}"
        assert result.fate.value == expectation.fate, why
        if expectation.fate == Fate.PASS.value:
            assert {(str(result.packet.dst), result.packet.dport)} == expectation.reaches, why
        for place, elements in result.learned.items():
            learned = {**learned, place: {**learned.get(place, {}), **elements}}
