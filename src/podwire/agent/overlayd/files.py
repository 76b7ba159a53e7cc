"""The files that an overlay agent leaves for others: subnet.env (CNI plugins), Docker's options, WireGuard's key."""

import base64
import ipaddress
import os
from pathlib import Path

from podwire.model.addr import Family, IPNetwork, family_of
from podwire.model.errors import InvalidInput
from podwire.plan.backends.wireguard import WireguardKeys, is_key
from podwire.plan.leases import networks as parse_networks


def subnet_env(networks: tuple[IPNetwork, ...], subnets: tuple[IPNetwork, ...], mtu: int, *, masquerade: bool) -> str:
    """flannel's subnet.env: what its CNI plugin, and many a script, reads. A subnet stands there as its first address."""
    lines: list[str] = []
    for family, prefix in ((Family.IPV4, "FLANNEL_"), (Family.IPV6, "FLANNEL_IPV6_")):
        network = next((n for n in networks if family_of(n) is family), None)
        subnet = next((s for s in subnets if family_of(s) is family), None)
        if network is not None and subnet is not None:
            lines += [f"{prefix}NETWORK={network}", f"{prefix}SUBNET={subnet.network_address + 1}/{subnet.prefixlen}"]
    lines += [f"FLANNEL_MTU={mtu}", f"FLANNEL_IPMASQ={'true' if masquerade else 'false'}"]
    return "\n".join(lines) + "\n"


def subnets_in_env(text: str) -> tuple[IPNetwork, ...]:
    """The node's own subnets as an earlier subnet.env has them; what does not parse is left out."""
    values = dict(line.strip().split("=", 1) for line in text.splitlines() if "=" in line)
    texts = (values.get(f"FLANNEL_{part}SUBNET", "").strip("\"'") for part in ("", "IPV6_"))
    interfaces = []
    for value in texts:
        try:
            interfaces.append(str(ipaddress.ip_interface(value).network))
        except ValueError:
            continue
    return parse_networks(interfaces)


def read_last_subnets(path: Path) -> tuple[IPNetwork, ...]:
    """The subnets that this node had before, if the file at `path` still says."""
    try:
        return subnets_in_env(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return ()


def docker_options(subnets: tuple[IPNetwork, ...], mtu: int, *, masquerade: bool) -> str:
    """An environment file for dockerd's unit, as flannel's mk-docker-opts.sh writes it: one option a line, and all in
    DOCKER_OPTS. Docker masquerades exactly if we do not. Empty of --bip without an IPv4 subnet."""
    four = next((s for s in subnets if s.version == 4), None)
    options = {
        "BIP": f"--bip={four.network_address + 1}/{four.prefixlen}" if four else "",
        "IPMASQ": f"--ip-masq={'false' if masquerade else 'true'}",
        "MTU": f"--mtu={mtu}",
    }
    given = {name: text for name, text in options.items() if text}
    lines = [f'DOCKER_OPT_{name}="{text}"' for name, text in given.items()]
    return "\n".join([*lines, f'DOCKER_OPTS=" {" ".join(given.values())}"']) + "\n"


def write_atomically(path: Path, text: str, mode: int = 0o644) -> None:
    """Replace the file at once: a reader sees the old text or the new. Makes its directory. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            os.fchmod(file.fileno(), mode)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def wireguard_keys(path: Path) -> WireguardKeys:
    """The node's keys: those in the file at `path`, or new ones that are put there, for the owner's eyes alone (0600).

    Raises InvalidInput for a file that holds no key, OSError for one that cannot be read or made."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey  # 6 MB that other back ends need not hold

    try:
        text = path.read_text(encoding="ascii").strip()
    except FileNotFoundError:
        raw = X25519PrivateKey.generate().private_bytes_raw()
        text = base64.b64encode(raw).decode()
        write_atomically(path, text + "\n", 0o600)
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{path} holds no WireGuard key; remove it to get a new one") from error
    if not is_key(text):
        raise InvalidInput(f"{path} holds no WireGuard key; remove it to get a new one")
    if path.stat().st_mode & 0o077:
        path.chmod(0o600)
    private = _clamped(base64.b64decode(text))
    public = X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()
    return WireguardKeys(base64.b64encode(private).decode(), base64.b64encode(public).decode())


def _clamped(key: bytes) -> bytes:
    """As the kernel keeps it, and shows it (RFC 7748, section 5): otherwise the device would never be as it shall be."""
    return bytes([key[0] & 0xF8, *key[1:31], key[31] & 0x7F | 0x40])
