"""What systemd is told: that a service is up, and the units that start it."""

import os
import re
import socket
from collections.abc import Sequence

_PLAIN = re.compile(r"[-A-Za-z0-9_@%$+=:,./]+")


def notify(state: str) -> None:
    """sd_notify(3): `READY=1`, `STOPPING=1`, … Nothing where this process is no service of type notify."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.connect("\0" + address[1:] if address.startswith("@") else address)
        sock.send(state.encode())


def server_unit(command: Sequence[str]) -> str:
    """The unit that runs `command`, a `podwire server …`."""
    return _unit("podwire API server and controllers", command, ("Restart=always", "RestartSec=1", "LimitNOFILE=1048576"))


def node_unit(command: Sequence[str]) -> str:
    """The unit that runs `command`, a `podwire join …`. The pods' shim outlives the agent: only the main process is ended.
    However long its API server is away, an agent that starts serves container engines meanwhile."""
    start = ("Restart=always", "RestartSec=1", "TimeoutStartSec=infinity")
    limits = ("KillMode=process", "Delegate=yes", "LimitNOFILE=1048576", "TasksMax=infinity")
    return _unit("podwire node agent", command, start + limits)


def _unit(description: str, command: Sequence[str], service: Sequence[str]) -> str:
    return "\n".join(
        (
            "[Unit]",
            f"Description={description}",
            "Wants=network-online.target",
            "After=network-online.target",
            "",
            "[Service]",
            "Type=notify",
            f"ExecStart={' '.join(_quoted(word) for word in command)}",
            *service,
            "",
            "[Install]",
            "WantedBy=multi-user.target",
            "",
        )
    )


def _quoted(word: str) -> str:
    """As a word of ExecStart= (systemd.service(5), "Command lines"), where %, $ and, within quotes of either kind, \\ mean
    something."""
    escaped = word.replace("%", "%%").replace("$", "$$")
    if _PLAIN.fullmatch(escaped):
        return escaped
    return '"' + escaped.replace("\\", "\\\\").replace('"', '\\"') + '"'
