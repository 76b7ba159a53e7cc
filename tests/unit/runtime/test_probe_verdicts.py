import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from podwire.model.objects import Container, ContainerPort, Probe
from podwire.runtime.probes import ProbeKind, ProbeTracker, port_number, probes_of


def test_readiness_turns_at_its_thresholds_only() -> None:
    tracker = ProbeTracker(ProbeKind.READINESS, Probe(success_threshold=2, failure_threshold=3))
    seen = []
    for result in (True, True, False, False, True, False, False, False, True, True):
        tracker.feed(result)
        seen.append(tracker.passing)
    assert seen == [False, True, True, True, True, True, True, False, False, True]


def test_a_container_counts_as_alive_but_not_as_ready_or_started_at_first() -> None:
    assert [ProbeTracker(kind, Probe()).passing for kind in ProbeKind] == [False, False, True]


@settings(deadline=None)
@given(
    results=st.lists(st.booleans(), max_size=60),
    success=st.integers(1, 5),
    failure=st.integers(1, 5),
)
def test_a_verdict_needs_its_threshold_of_equal_results_in_a_row(results: list[bool], success: int, failure: int) -> None:
    tracker = ProbeTracker(ProbeKind.READINESS, Probe(success_threshold=success, failure_threshold=failure))
    for position, result in enumerate(results, start=1):
        before = tracker.passing
        verdict = tracker.feed(result)
        needed = success if result else failure
        run = results[max(0, position - needed) : position]
        assert verdict == (len(run) == needed and all(value is result for value in run))
        assert tracker.passing == (result if verdict else before)


def test_finds_ports_by_name() -> None:
    container = Container(name="web", ports=(ContainerPort(container_port=8080, name="http"),))
    assert port_number("http", container) == 8080
    assert port_number(81, container) == 81
    assert port_number("81", container) == 81
    with pytest.raises(ValueError, match="no port named 'metrics'"):
        port_number("metrics", container)


def test_lists_the_declared_probes() -> None:
    container = Container(name="web", liveness_probe=Probe(), startup_probe=Probe())
    assert [kind for kind, _ in probes_of(container)] == [ProbeKind.STARTUP, ProbeKind.LIVENESS]
