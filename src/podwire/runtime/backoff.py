"""When a container that ended may start again: as kubelet does it."""

INITIAL_SECONDS = 10.0
MAX_SECONDS = 300.0
RESET_SECONDS = 600.0


class RestartBackoff:
    """The first restart is immediate; then 10 s after the end, doubling to 5 min. A run of 10 min starts over."""

    def __init__(self) -> None:
        self._delay = 0.0
        self._since = 0.0

    @classmethod
    def resumed(cls, restarts: int, started_at: float) -> "RestartBackoff":
        """The state after `restarts`, the last of them at `started_at`."""
        backoff = cls()
        for _ in range(min(restarts, 10)):
            backoff.restarted(started_at, started_at)
        return backoff

    def start_at(self, finished_at: float) -> float:
        """The time from which a container that ended at `finished_at` may be started."""
        return finished_at if self._expired(finished_at) else finished_at + self._delay

    def restarted(self, finished_at: float, now: float) -> None:
        """Note that it was started again at `now`."""
        fresh = self._delay == 0 or self._expired(finished_at)
        self._delay = INITIAL_SECONDS if fresh else min(2 * self._delay, MAX_SECONDS)
        self._since = now

    @property
    def delay(self) -> float:
        """The present delay in seconds."""
        return self._delay

    def _expired(self, finished_at: float) -> bool:
        return finished_at - self._since > RESET_SECONDS
