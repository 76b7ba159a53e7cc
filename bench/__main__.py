"""`python -m bench [NAME…]`: run the benchmarks, print their figures, write them to bench/results/<UTC time>.json.

One that fails, or takes longer than 20 minutes, is left out of the file, and the status is 1."""

import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

BENCHES = (
    "services",
    "connections",
    "convergence",
    "rolling",
    "kernel",
    "lab",
    "answering",
    "throughput",
    "overlay",
    "udptunnel",
    "cni",
    "cli",
)
TIMEOUT_SECONDS = 1200
GRACE_SECONDS = 60
"""For one that is interrupted to take down its lab."""


def main(names: list[str]) -> int:
    if {"-h", "--help"}.intersection(names):
        print(f"{__doc__}\n\nThere are: {', '.join(BENCHES)}")
        return 0
    unknown = sorted(set(names) - set(BENCHES))
    if unknown:
        print(f"no benchmark {', '.join(unknown)}; there are: {', '.join(BENCHES)}", file=sys.stderr)
        return 2
    results: dict[str, object] = {
        "machine": {"kernel": platform.release(), "python": platform.python_version(), "started": _now()},
    }
    failed = False
    for name in names or BENCHES:
        print(f"\n== {name}", flush=True)
        try:
            results[name] = _run(name)
        except subprocess.TimeoutExpired:
            print(f"{name} took longer than {TIMEOUT_SECONDS} s")
            failed = True
        except subprocess.CalledProcessError as error:
            print(f"{name} failed with status {error.returncode}")
            failed = True
    target = Path(__file__).parent / "results" / f"{_now().replace(':', '')}.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(results, indent=2) + "\n")
    print(f"\nwritten to {target}")
    return 1 if failed else 0


def _run(name: str) -> object:
    """The benchmark's figures. Raises TimeoutExpired and CalledProcessError."""
    # A process each: what one leaves in memory must not weigh on the next. A group each: what it started ends with it.
    with subprocess.Popen(
        [sys.executable, "-m", f"bench.{name}", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    ) as child:
        try:
            figures, said = child.communicate(timeout=TIMEOUT_SECONDS)
        except BaseException:
            _end(child)
            raise
    sys.stdout.write(said)
    if child.returncode:
        raise subprocess.CalledProcessError(child.returncode, child.args)
    return json.loads(figures)


def _end(child: subprocess.Popen[str]) -> None:
    """Ends the child's whole group: first as Ctrl-C would, for it to take down what it put up."""
    with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
        os.killpg(child.pid, signal.SIGINT)
        sys.stdout.write(child.communicate(timeout=GRACE_SECONDS)[1])
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
