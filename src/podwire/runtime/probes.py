"""What probe results amount to: pure. Thresholds and starting values are kubelet's."""

from dataclasses import dataclass
from enum import Enum

from podwire.model.objects import Container, Probe


class ProbeKind(Enum):
    STARTUP = "Startup"
    READINESS = "Readiness"
    LIVENESS = "Liveness"

    @property
    def initially(self) -> bool:
        """What holds before the first verdict: alive, but neither ready nor started."""
        return self is ProbeKind.LIVENESS


class ProbeTracker:
    """Counts results of one probe and gives its verdict, which turns only at the thresholds."""

    def __init__(self, kind: ProbeKind, probe: Probe, passing: bool | None = None) -> None:
        self.kind, self.probe = kind, probe
        self.passing = kind.initially if passing is None else passing
        self._last: bool | None = None
        self._run = 0

    def feed(self, success: bool) -> bool:
        """Take a result; returns True if it counts as a verdict, that is, reached its threshold with this result or before."""
        self._run = self._run + 1 if success is self._last else 1
        self._last = success
        threshold = self.probe.success_threshold if success else self.probe.failure_threshold
        if self._run < threshold:
            return False
        self.passing = success
        return True


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """How a single probe went; `output` is what to tell when it failed."""

    success: bool
    output: str = ""


def probes_of(container: Container) -> list[tuple[ProbeKind, Probe]]:
    """Those that the container declares."""
    declared = (
        (ProbeKind.STARTUP, container.startup_probe),
        (ProbeKind.READINESS, container.readiness_probe),
        (ProbeKind.LIVENESS, container.liveness_probe),
    )
    return [(kind, probe) for kind, probe in declared if probe is not None]


def port_number(port: int | str, container: Container) -> int:
    """A probe's port, by number or by the name of a container port. Raises ValueError for an unknown name."""
    if isinstance(port, int):
        return port
    for declared in container.ports:
        if declared.name == port:
            return declared.container_port
    if port.isdigit():
        return int(port)
    raise ValueError(f"container {container.name} has no port named {port!r}")
