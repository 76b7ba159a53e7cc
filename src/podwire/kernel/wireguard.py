"""WireGuard devices of one namespace, over generic netlink. Blocking: `LinuxKernel` calls it off the event loop."""

import errno

from podwire.kernel.port import KernelError
from podwire.kernel.rtnlsocket import Outcome, RtnlSocket
from podwire.model.errors import Unsupported
from podwire.model.kernelstate import Wireguard, WireguardPeer
from podwire.wire import wireguard
from podwire.wire.wireguard import WireguardState


class WireguardClient:
    """Sets and reads devices. Raises Unsupported where the kernel has no WireGuard."""

    def __init__(self, fd: int) -> None:
        self._sock = RtnlSocket(fd, wireguard.NETLINK_GENERIC)
        self._family = 0

    @property
    def family(self) -> int:
        """The family's number. It exists once the module is loaded, which making a device does."""
        if not self._family:
            outcome = self._sock.execute([wireguard.get_family()])
            if 0 not in outcome.answers:
                raise Unsupported("WireGuard", "run `sudo modprobe wireguard`")
            self._family = wireguard.read_family(outcome.answers[0])
        return self._family

    def set_device(self, name: str, device: Wireguard) -> Outcome:
        return self._sock.execute([wireguard.set_device(self.family, name, device)])

    def change_peers(self, changes: list[tuple[WireguardPeer, bool]]) -> Outcome:
        """Set (True) or remove (False) peers, in order."""
        family = self.family
        return self._sock.execute(
            [wireguard.set_peer(family, peer) if wanted else wireguard.del_peer(family, peer) for peer, wanted in changes]
        )

    def read(self, name: str) -> WireguardState:
        """A device with its peers. Raises KernelError for one that has just gone (ENODEV)."""
        messages = self._sock.dump(wireguard.dump_device(self.family, name))
        if not messages:
            raise KernelError(f"there is no WireGuard device {name}", errno.ENODEV)
        return wireguard.read_device(name, messages)

    def close(self) -> None:
        self._sock.close()
