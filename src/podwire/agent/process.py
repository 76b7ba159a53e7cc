"""What this process is and what it uses, as metrics: `process_…` as every Prometheus client has them, and podwire's version."""

import os
import platform
import resource
from pathlib import Path

from podwire import __version__
from podwire.agent.exposition import family

_STAT_AFTER_NAME = 3
"""proc(5): the first field of /proc/PID/stat after the name, which may have blanks and brackets in it, is number 3."""
_UTIME, _STIME, _START_TIME, _VSIZE, _RSS = 14, 15, 22, 23, 24


def process_text(proc: Path = Path("/proc")) -> str:
    """Raises OSError where there is no /proc."""
    stat = (proc / "self/stat").read_text(encoding="utf-8", errors="replace").rpartition(") ")[2].split()

    def field(number: int) -> int:
        return int(stat[number - _STAT_AFTER_NAME])

    ticks, page = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
    booted = next(
        int(line.split()[1]) for line in (proc / "stat").read_text(encoding="utf-8").splitlines() if line.startswith("btime ")
    )
    numbers: tuple[tuple[str, str, str, float], ...] = (
        ("cpu_seconds_total", "counter", "CPU time spent, user and system.", (field(_UTIME) + field(_STIME)) / ticks),
        ("start_time_seconds", "gauge", "When this process began, since the epoch.", booted + field(_START_TIME) / ticks),
        ("resident_memory_bytes", "gauge", "Memory that is in RAM.", field(_RSS) * page),
        ("virtual_memory_bytes", "gauge", "Memory that is mapped.", field(_VSIZE)),
        ("open_fds", "gauge", "Open file descriptors.", len(os.listdir(proc / "self/fd"))),
        ("max_fds", "gauge", "How many there may be.", _most_fds()),
    )
    about = {"version": __version__, "python_version": platform.python_version()}
    texts = [family(f"process_{name}", kind, text, [({}, value)]) for name, kind, text, value in numbers]
    return "".join(texts) + family("podwire_build_info", "gauge", "What runs here.", [(about, 1)])


def _most_fds() -> int:
    """No limit is written as the largest number, as Go's client has it."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 2**64 - 1 if limit == resource.RLIM_INFINITY else limit
