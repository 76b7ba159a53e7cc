"""What goes over the shim's socket: each packet one JSON object, descriptors beside it.

Requests: `{"id": n, "do": verb, …}`; answers: `{"id": n, "ok": {…}}` or `{"id": n, "error": text}`;
events: `{"event": name, …}`.
The values here travel as the fields of such objects.
"""

from dataclasses import asdict, dataclass
from typing import Any

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class SandboxSpec:
    """A pod's namespaces. `host_network`: the node's own network namespace instead of a new one."""

    uid: str
    namespace: str
    name: str
    hostname: str
    host_network: bool = False
    share_pids: bool = False


@dataclass(frozen=True, slots=True)
class Mount:
    """A bind of `source` (a path outside) over `target` (a path inside); `target` need not exist."""

    source: str
    target: str
    read_only: bool = False


@dataclass(frozen=True, slots=True)
class StandInPort:
    protocol: str
    port: int


@dataclass(frozen=True, slots=True)
class ContainerSpec:
    """One run of a container. No `argv`: a stand-in on `ports`. `env` is the whole environment; `note` is the runtime's own.
    `completes`: a stand-in that ends at once, successfully (for an init container, which others wait for)."""

    uid: str
    cid: str
    name: str
    attempt: int
    log: str
    stage: str
    argv: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    cwd: str = ""
    mounts: tuple[Mount, ...] = ()
    ports: tuple[StandInPort, ...] = ()
    node: str = ""
    note: str = ""
    completes: bool = False

    @classmethod
    def from_message(cls, fields: Message) -> "ContainerSpec":
        return cls(
            **{
                **fields,
                "argv": tuple(fields["argv"]),
                "env": tuple(fields["env"]),
                "mounts": tuple(Mount(**mount) for mount in fields["mounts"]),
                "ports": tuple(StandInPort(**port) for port in fields["ports"]),
            }
        )


@dataclass(frozen=True, slots=True)
class ContainerRecord:
    """A run of a container as the shim remembers it. Times are Unix seconds; `finished_at` 0: it runs.
    `reason` and `message` where an end has more to say than its exit code."""

    uid: str
    cid: str
    name: str
    attempt: int
    log: str
    stand_in: bool
    pid: int
    started_at: float
    finished_at: float = 0.0
    exit_code: int = 0
    signal: int = 0
    note: str = ""
    reason: str = ""
    message: str = ""

    @property
    def running(self) -> bool:
        return self.finished_at == 0.0


def fields_of(value: SandboxSpec | ContainerSpec | ContainerRecord) -> Message:
    """The value as JSON can carry it."""
    return asdict(value)
