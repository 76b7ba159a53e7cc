"""Putting the plugin where container engines look: the executed file, and the configuration that names it."""

import filecmp
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from podwire.model.errors import InvalidInput
from podwire.model.meta import Json
from podwire.wire.cni import NETWORK_NAME

BIN_DIR = Path("/opt/cni/bin")
CONF_DIR = Path("/etc/cni/net.d")
PLUGIN_NAME = "podwire"
LOOPBACK_NAME = "loopback"
"""What containerd before 2.0 executes for each pod beside the network's plugin."""
POD_ANNOTATIONS = "io.kubernetes.cri.pod-annotations"
"""The capability by which containerd hands on what it is told of a pod beside its network."""
COMPILERS = ("cc", "gcc", "clang", "tcc")
_COMPILE_SECONDS = 60

_HERE = Path(__file__).parent


def configuration(network: str, *, mtu: int = 0) -> Json:
    """The network list: one plugin does it all. An engine that knows `cniVersions` takes the highest it can; one that does not
    takes `cniVersion`."""
    plugin: Json = {
        "type": PLUGIN_NAME,
        "capabilities": {"portMappings": True, "bandwidth": True, "ips": True, "mac": True, "aliases": True,
                         POD_ANNOTATIONS: True},
    }  # fmt: skip
    plugin |= {"mtu": mtu} if mtu else {}
    versions = ["0.4.0", "1.0.0", "1.1.0"]
    return {"cniVersion": "1.0.0", "cniVersions": versions, "name": network, "plugins": [plugin]}


def check_network(name: str) -> None:
    """Raises InvalidInput for a name that no plugin would take."""
    if not NETWORK_NAME.fullmatch(name):
        raise InvalidInput(f"{name!r} is no name of a network: letters, digits, and _ . - behind the first")


def install_plugin(directory: Path, socket: Path, *, compiled: bool = True) -> str:
    """Write the executed file for an agent on `socket`; returns how it came to be: "compiled" or "python".

    It is compiled where the machine has a compiler (and `compiled`), because that saves ten milliseconds for each container.
    The file is replaced in one step: an engine may execute it at any moment. Where there is no plugin `loopback`, a copy of
    it serves as that too. Raises InvalidInput, OSError."""
    if not socket.is_absolute():
        raise InvalidInput(f"the socket's path {socket} is not absolute: engines execute the plugin anywhere")
    if any(character in str(socket) for character in '"\\\n'):
        raise InvalidInput(f"the socket's path {socket} has a character that cannot be written into the plugin")
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".podwire-", dir=directory) as scratch:
        made = Path(scratch) / PLUGIN_NAME
        how = "compiled" if compiled and _compile(made, socket) else "python"
        if how == "python":
            source = (_HERE / "plugin.py").read_text(encoding="utf-8")
            made.write_text(source.replace("@SOCKET@", str(socket)), encoding="utf-8")
        made.chmod(0o755)
        if _has_no_other_loopback(directory):
            # Not a link: whoever installs the reference plugins over it must not write through it.
            os.replace(shutil.copy(made, Path(scratch) / LOOPBACK_NAME), directory / LOOPBACK_NAME)
        os.replace(made, directory / PLUGIN_NAME)
    return how


def _has_no_other_loopback(directory: Path) -> bool:
    loopback, plugin = directory / LOOPBACK_NAME, directory / PLUGIN_NAME
    return not loopback.exists() or (plugin.exists() and filecmp.cmp(loopback, plugin, shallow=False))


def install_configuration(directory: Path, network: str, *, priority: int = 10, mtu: int = 0) -> Path:
    """Write `<priority>-<network>.conflist`, in one step. Returns where it is. Raises InvalidInput, OSError."""
    check_network(network)
    directory.mkdir(parents=True, exist_ok=True)
    target = directory / f"{priority:02}-{network}.conflist"
    partial = directory / f".{target.name}.{os.getpid()}"
    partial.write_text(json.dumps(configuration(network, mtu=mtu), indent=2) + "\n", encoding="utf-8")
    os.replace(partial, target)
    return target


def _compile(target: Path, socket: Path) -> bool:
    compiler = next((found for name in COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        return False
    options = ["-O2", f'-DSOCKET="{socket}"', "-o", str(target), str(_HERE / "plugin.c")]
    # Static where that can be had: the file may be executed where this machine's C library is not (an engine's image).
    for linking in (["-static"], []):
        done = subprocess.run([compiler, *linking, *options], capture_output=True, timeout=_COMPILE_SECONDS, check=False)
        if done.returncode == 0:
            return True
    return False
