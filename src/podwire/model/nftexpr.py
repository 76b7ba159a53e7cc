"""nftables expressions: what a rule is made of. Each reads and writes the kernel's registers.

Registers are numbered 0 to 15, four bytes each; a longer value takes several in a row. `__str__` gives the line that
`nft --debug=netlink` would, without the brackets' padding.
"""

import enum
from dataclasses import dataclass

REGISTERS = 16

IFNAMSIZ = 16
"""Bytes of a device's name in a register, zeros at its end included."""
IPS_DST_NAT = 1 << 5
"""A bit of `ct status` (linux/netfilter/nf_conntrack_common.h): the connection's destination was rewritten."""
RTN_UNICAST, RTN_LOCAL = 1, 2
"""Results of `fib … type` (linux/rtnetlink.h): an address elsewhere, one of this machine."""


class VerdictCode(enum.Enum):
    """`.value` is the kernel's number (NF_DROP, NF_ACCEPT, NFT_JUMP, …)."""

    DROP = 0
    ACCEPT = 1
    CONTINUE = -1
    JUMP = -3
    GOTO = -4
    RETURN = -5


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of a packet; `chain` for JUMP and GOTO."""

    code: VerdictCode
    chain: str = ""

    def __str__(self) -> str:
        return f"{self.code.name.lower()} {self.chain}".strip()


ACCEPT = Verdict(VerdictCode.ACCEPT)
DROP = Verdict(VerdictCode.DROP)
RETURN = Verdict(VerdictCode.RETURN)


def jump(chain: str) -> Verdict:
    return Verdict(VerdictCode.JUMP, chain)


def goto(chain: str) -> Verdict:
    return Verdict(VerdictCode.GOTO, chain)


class PayloadBase(enum.Enum):
    LINK = 0
    NETWORK = 1
    TRANSPORT = 2


@dataclass(frozen=True, slots=True)
class Payload:
    """Bytes of the packet → register."""

    base: PayloadBase
    offset: int
    length: int
    dreg: int

    def __str__(self) -> str:
        return f"[ payload load {self.length}b @ {self.base.name.lower()} header + {self.offset} => reg {self.dreg} ]"


class MetaKey(enum.Enum):
    PRIORITY = 2
    MARK = 3
    IIFNAME = 6
    L4PROTO = 16


@dataclass(frozen=True, slots=True)
class Meta:
    key: MetaKey
    dreg: int

    def __str__(self) -> str:
        return f"[ meta load {self.key.name.lower()} => reg {self.dreg} ]"


@dataclass(frozen=True, slots=True)
class SetMeta:
    """A register → the packet's PRIORITY or MARK, numbers in host order."""

    key: MetaKey
    sreg: int

    def __str__(self) -> str:
        return f"[ meta set {self.key.name.lower()} with reg {self.sreg} ]"


class CtKey(enum.Enum):
    """Conntrack: `ct status`; the original direction's destination address of the family, its source, its port."""

    STATUS = 2
    PROTO_DST = 12
    SRC_IP = 19
    DST_IP = 20
    SRC_IP6 = 21
    DST_IP6 = 22


@dataclass(frozen=True, slots=True)
class Ct:
    """A conntrack field → register; `original` asks for the original direction's (for keys that have a direction)."""

    key: CtKey
    dreg: int
    original: bool = False

    def __str__(self) -> str:
        return f"[ ct load {self.key.name.lower()} => reg {self.dreg}{' , dir original' if self.original else ''} ]"


class CmpOp(enum.Enum):
    EQ = 0
    NEQ = 1


@dataclass(frozen=True, slots=True)
class Cmp:
    """Goes on only if the register's bytes compare so with `data`."""

    op: CmpOp
    sreg: int
    data: bytes

    def __str__(self) -> str:
        return f"[ cmp {self.op.name.lower()} reg {self.sreg} 0x{self.data.hex()} ]"


@dataclass(frozen=True, slots=True)
class Bitwise:
    """dreg = (sreg & mask) ^ xor."""

    sreg: int
    dreg: int
    mask: bytes
    xor: bytes

    def __str__(self) -> str:
        return f"[ bitwise reg {self.dreg} = ( reg {self.sreg} & 0x{self.mask.hex()} ) ^ 0x{self.xor.hex()} ]"


@dataclass(frozen=True, slots=True)
class Lookup:
    """Looks the registers from `sreg` up in a set. A miss ends the rule (`inverted`: a hit does).

    In a map the data goes to `dreg`; `verdict` takes it as the rule's verdict."""

    set: str
    sreg: int
    dreg: int | None = None
    verdict: bool = False
    inverted: bool = False

    def __str__(self) -> str:
        target = " dreg verdict" if self.verdict else f" dreg {self.dreg}" if self.dreg is not None else ""
        return f"[ lookup reg {self.sreg} set {self.set}{target}{' 0x1' if self.inverted else ''} ]"


@dataclass(frozen=True, slots=True)
class Numgen:
    """A random number below `modulus`, in host order → register."""

    dreg: int
    modulus: int

    def __str__(self) -> str:
        return f"[ numgen reg {self.dreg} = random mod {self.modulus} ]"


@dataclass(frozen=True, slots=True)
class Dnat:
    """Rewrite the destination to the address (and port) in the registers; ends the chain's walk."""

    family_is_ipv6: bool
    reg_address: int
    reg_port: int

    def __str__(self) -> str:
        family = "ip6" if self.family_is_ipv6 else "ip"
        return f"[ nat dnat {family} addr_min reg {self.reg_address} proto_min reg {self.reg_port} ]"


@dataclass(frozen=True, slots=True)
class Masquerade:
    """Rewrite the source to the address of the device that the packet leaves by; the port fully random."""

    fully_random: bool = True

    def __str__(self) -> str:
        return "[ masq fully-random ]" if self.fully_random else "[ masq ]"


@dataclass(frozen=True, slots=True)
class Immediate:
    """The rule's verdict."""

    verdict: Verdict

    def __str__(self) -> str:
        return f"[ immediate {self.verdict} ]"


@dataclass(frozen=True, slots=True)
class Constant:
    """Bytes → register."""

    data: bytes
    dreg: int

    def __str__(self) -> str:
        return f"[ immediate reg {self.dreg} 0x{self.data.hex()} ]"


class DynsetOp(enum.Enum):
    ADD = 0
    UPDATE = 1
    DELETE = 2


@dataclass(frozen=True, slots=True)
class Dynset:
    """Put (UPDATE: also refresh the time-out; the data of one that is there stays), or delete, an element made of registers."""

    op: DynsetOp
    set: str
    sreg_key: int
    sreg_data: int | None = None
    timeout_s: int = 0

    def __str__(self) -> str:
        data = f" sreg_data {self.sreg_data}" if self.sreg_data is not None else ""
        timeout = f" timeout {self.timeout_s}s" if self.timeout_s else ""
        return f"[ dynset {self.op.name.lower()} reg_key {self.sreg_key} set {self.set}{data}{timeout} ]"


@dataclass(frozen=True, slots=True)
class Reject:
    """Refuse the packet and say so: a TCP reset, or the family's ICMP port unreachable."""

    tcp_reset: bool
    family_is_ipv6: bool

    def __str__(self) -> str:
        return "[ reject tcp reset ]" if self.tcp_reset else "[ reject port unreachable ]"


@dataclass(frozen=True, slots=True)
class Counter:
    """Counts packets and bytes. The counts are no part of the value."""

    def __str__(self) -> str:
        return "[ counter ]"


@dataclass(frozen=True, slots=True)
class FibSaddrType:
    """The routing type of the packet's source address (RTN_LOCAL = 2), host order → register."""

    dreg: int

    def __str__(self) -> str:
        return f"[ fib saddr type => reg {self.dreg} ]"


@dataclass(frozen=True, slots=True)
class Unknown:
    """An expression of a rule that someone else wrote; kept so that such a rule never equals one of ours."""

    name: str
    data: bytes = b""

    def __str__(self) -> str:
        return f"[ {self.name} ]"


Expression = (
    Payload | Meta | SetMeta | Ct | Cmp | Bitwise | Lookup | Numgen | Dnat | Masquerade | Immediate | Constant | Dynset | Reject
    | Counter | FibSaddrType | Unknown
)  # fmt: skip
