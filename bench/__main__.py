"""`python -m bench [NAME…]`: run the benchmarks, print their figures, write them to bench/results/<UTC time>.json."""

import json
import platform
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


def main(names: list[str]) -> int:
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
        # A process each: what one leaves in memory must not weigh on the next.
        done = subprocess.run(
            [sys.executable, "-m", f"bench.{name}", "--json"],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
        sys.stdout.write(done.stderr)
        if done.returncode:
            print(f"{name} failed with status {done.returncode}")
            failed = True
        else:
            results[name] = json.loads(done.stdout)
    target = Path(__file__).parent / "results" / f"{_now().replace(':', '')}.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(results, indent=2) + "\n")
    print(f"\nwritten to {target}")
    return 1 if failed else 0


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
