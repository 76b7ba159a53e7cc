"""Metrics in Prometheus' text format: counters end in _total, times are seconds."""

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence

Samples = Iterable[tuple[Mapping[str, str], float]]
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def family(name: str, kind: str, text: str, samples: Samples) -> str:
    """One metric with all its samples. `kind` is counter or gauge."""
    lines = [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
    lines += [_sample(name, labels, value) for labels, value in samples]
    return "\n".join(lines) + "\n"


class Histogram:
    """How often values up to each of `bounds` (ascending) occurred."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    @property
    def count(self) -> int:
        return sum(self._counts)

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def samples(self, name: str, labels: Mapping[str, str]) -> list[str]:
        """The lines of one series."""
        lines, total = [], 0
        for bound, count in zip((*self._bounds, None), self._counts, strict=True):
            total += count
            lines.append(_sample(f"{name}_bucket", {**labels, "le": "+Inf" if bound is None else f"{bound:g}"}, total))
        return [*lines, _sample(f"{name}_sum", labels, self._sum), _sample(f"{name}_count", labels, total)]

    def text(self, name: str, text: str, series: Iterable[Mapping[str, str]] = ({},)) -> str:
        """`series`: the labels of each series; all show the same."""
        return histograms(name, text, [(labels, self) for labels in series])


def histograms(name: str, text: str, series: Iterable[tuple[Mapping[str, str], Histogram]]) -> str:
    """One metric with the histogram of each series."""
    lines = [f"# HELP {name} {text}", f"# TYPE {name} histogram"]
    for labels, histogram in series:
        lines += histogram.samples(name, labels)
    return "\n".join(lines) + "\n"


def exponential(start: float, factor: float, count: int) -> tuple[float, ...]:
    return tuple(start * factor**n for n in range(count))


def _sample(name: str, labels: Mapping[str, str], value: float) -> str:
    inner = ",".join(f'{key}="{_escaped(label)}"' for key, label in labels.items())
    shown = str(int(value)) if value == int(value) else repr(value)
    return f"{name}{{{inner}}} {shown}" if inner else f"{name} {shown}"


def _escaped(label: str) -> str:
    return label.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
