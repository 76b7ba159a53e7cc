"""The case files: objects → rules → what becomes of packets, by each back end's evaluator; and asked of the oracle."""

from dataclasses import replace

import pytest
from draws import told
from service_cases import Case, Story, load_cases, load_stories
from service_checks import Objects, assert_kernel_does, assert_oracle_says, machine_of
from simulated import BACK_ENDS, remember

from podwire.trace.journey import Fate

CASES = list(load_cases(special=True))
STORIES = list(load_stories())


@pytest.mark.parametrize("back_end", BACK_ENDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_packets_go_where_the_case_says(case: Case, back_end: str) -> None:
    kernel = BACK_ENDS[back_end](case.facts)
    case.feed(kernel)
    kernel.program()
    assert kernel.held() == kernel.desired()
    for expectation in case.packets:
        expected = expectation.in_ipvs if back_end == "ipvs" else expectation
        assert_kernel_does(kernel.walk, expected, case.facts, case.name)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_oracle_promises_what_the_case_says(case: Case) -> None:
    objects = Objects()
    case.feed(objects)
    for expectation in case.packets:
        assert_oracle_says(objects.cluster(case.facts), expectation)


# --- sequences of packets and changes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("story", "back_end"), [pytest.param(s, b, id=f"{s.name}-{b}") for s in STORIES for b in s.back_ends])
def test_clients_are_remembered_as_the_story_says(story: Story, back_end: str) -> None:
    """The kernel keeps what a packet leaves in it until it is told to forget."""
    kernel = BACK_ENDS[back_end](story.facts)
    for number, (objects, expectation, draw) in enumerate(story.steps):
        for item in objects:
            story.feed_one(kernel, item)
        kernel.program()
        if expectation is None:
            continue
        machine = told(replace(machine_of(story.facts), learned=kernel.memory), draw)
        result = kernel.walk(expectation.packet, machine, locally_made=expectation.locally_made)
        remember(kernel, result)
        why = f"{story.name}, step {number}: {expectation.label}"
        assert result.fate.value == expectation.fate, why
        if expectation.fate == Fate.PASS.value:
            assert {(str(result.packet.dst), result.packet.dport)} == expectation.reaches, why
