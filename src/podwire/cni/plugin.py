#!/usr/bin/python3 -IS
"""The CNI plugin that a container engine executes: hands what it is given to the node's agent and prints what that answers.

Nothing but the standard library, and little of that: each import is paid for by every container. `plugin.c` does the same
in a tenth of the time, where a compiler was at hand when it was installed. A DEL that no agent takes is kept in the spool,
which the agent works off when it starts: the container's address must not stay taken because of an agent's pause.
"""

import os
import sys
from socket import AF_UNIX, SHUT_WR, SOCK_STREAM, send_fds, socket

SOCKET = "@SOCKET@"
VARIABLES = ("CNI_COMMAND", "CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_ARGS")
VERSIONS = '{"cniVersion":"1.1.0","supportedVersions":["0.3.0","0.3.1","0.4.0","1.0.0","1.1.0"]}'
TIMEOUT_SECONDS = 90.0
NAMES = ("CNI_CONTAINERID", "CNI_IFNAME")
"""What a DEL must name: one without is nobody's, and never kept."""
SPOOL_IT = 9
"""The agent's answer to a DEL that it can neither do nor keep."""


def main() -> int:
    command = os.environ.get("CNI_COMMAND", "")
    config = sys.stdin.buffer.read()
    if command == "VERSION":
        print(VERSIONS)
        return 0
    missing = [name for name in NAMES if not os.environ.get(name)]
    if command == "DEL" and missing:
        return fail(4, f"required env variables [{','.join(missing)}] are missing", "")
    path = os.environ.get("PODWIRE_CNI_SOCKET") or SOCKET
    request = b"podwire-cni 1\n" + b"".join(
        f"{name}={os.environ[name]}\0".encode(errors="surrogateescape") for name in VARIABLES if os.environ.get(name)
    )
    request += b"\0" + config
    answer = ask(path, request)
    if (answer is None or answer[0] == SPOOL_IT) and command == "DEL":
        spool(path + ".spool")
        # An agent that began to listen after the first try may have looked into the spool before that. Whatever it says
        # now: the DEL is kept, and it will do it.
        ask(path, request)
        return 0
    if answer is None:
        code = 50 if command == "STATUS" else 11
        return fail(code, f"podwire's agent does not answer on {path}", "is it running on this node?")
    status, document = answer
    sys.stdout.buffer.write(document)
    return status


def ask(path: str, request: bytes) -> "tuple[int, bytes] | None":
    """The agent's whole answer; None without one. The container's namespace goes along as a descriptor: the agent may not
    see the engine's paths."""
    try:
        netns = os.open(os.environ.get("CNI_NETNS", ""), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        netns = -1
    try:
        with socket(AF_UNIX, SOCK_STREAM) as agent:
            agent.settimeout(TIMEOUT_SECONDS)
            agent.connect(path)
            sent = send_fds(agent, [request], [netns] if netns >= 0 else [])
            agent.sendall(request[sent:])
            agent.shutdown(SHUT_WR)
            answer = b""
            while block := agent.recv(65536):
                answer += block
    except OSError:
        return None
    finally:
        if netns >= 0:
            os.close(netns)
    line, _, document = answer.partition(b"\n")
    status, _, length = line.partition(b" ")
    if not length.isdigit() or int(length) != len(document):
        return None
    return int(status), document


def spool(directory: str) -> None:
    """Keep a DEL for the agent's next start. Raises OSError.

    The file's name says all, so that it is whole from the first moment."""
    name = f"{os.environ.get('CNI_CONTAINERID', '')}@{os.environ.get('CNI_IFNAME', '')}"
    if "/" in name:
        raise OSError(f"CNI_CONTAINERID and CNI_IFNAME make no file name: {name}")
    os.makedirs(directory, mode=0o700, exist_ok=True)
    os.close(os.open(os.path.join(directory, name), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))


def fail(code: int, message: str, details: str) -> int:
    """Print an error document; all its texts are free of what JSON would have to escape."""
    print(f'{{"cniVersion":"1.1.0","code":{code},"msg":"{message}","details":"{details}"}}')
    return 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except OSError as error:
        sys.exit(fail(5, "the DEL could not be kept for the agent", str(error).replace("\\", "/").replace('"', "'")))
