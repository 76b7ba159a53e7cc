"""nftables as values (placeholder until the nft codec lands: only the name that `ops` needs)."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Batch:
    """One atomic nftables transaction: commands in order."""

    commands: tuple[object, ...] = ()


@dataclass(frozen=True, slots=True)
class Ruleset:
    """A table's content, per family, as planned or as read back."""
