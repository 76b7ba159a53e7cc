from hypothesis import given, settings
from hypothesis import strategies as st

from podwire.runtime.backoff import MAX_SECONDS, RestartBackoff


def crash(backoff: RestartBackoff, finished_at: float) -> float:
    """A container that ends at `finished_at` and again right after its restart: the delay before it."""
    start = backoff.start_at(finished_at)
    backoff.restarted(finished_at, start)
    return start - finished_at


def test_doubles_from_ten_seconds_to_five_minutes() -> None:
    backoff, now, delays = RestartBackoff(), 1000.0, []
    for _ in range(9):
        delays.append(crash(backoff, now))
        now += delays[-1]
    assert delays == [0, 10, 20, 40, 80, 160, 300, 300, 300]


def test_starts_over_after_a_run_of_ten_minutes() -> None:
    backoff, now = RestartBackoff(), 1000.0
    for _ in range(5):
        now += crash(backoff, now)
    assert crash(backoff, now + 601) == 0
    assert crash(backoff, now + 602) == 10


@settings(deadline=None)
@given(restarts=st.integers(0, 30))
def test_is_the_same_after_the_agent_was_restarted(restarts: int) -> None:
    lived, now = RestartBackoff(), 1000.0
    for _ in range(restarts):
        now += crash(lived, now)
    resumed = RestartBackoff.resumed(restarts, now)
    assert resumed.start_at(now) == lived.start_at(now)


@settings(deadline=None)
@given(ends=st.lists(st.floats(0, 5000), max_size=30))
def test_never_waits_longer_than_the_maximum(ends: list[float]) -> None:
    backoff, now = RestartBackoff(), 0.0
    for ran in ends:
        delay = crash(backoff, now + ran)
        assert 0 <= delay <= MAX_SECONDS
        now += ran + delay
