"""From the rules that a chain holds to those it shall hold: which to insert where, and which to delete.

A rule that stays keeps its handle and its counters. And it keeps the maps it looks up bound to the chain: where the first
rule of a chain binds a map, the kernel looks at every element, which at 100,000 Services takes longer than all the rest.
"""

from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import NamedTuple

from podwire.model.nft import Rule


class HeldRule(NamedTuple):
    """A rule of a chain. `handle`: the kernel's name for it; 0 while it is not known, for one that was only just sent."""

    rule: Rule
    handle: int


class Insertion(NamedTuple):
    """`before`: the handle of the rule that comes next; 0: at the end."""

    rule: Rule
    before: int


class Edit(NamedTuple):
    """Carry out all insertions in order, then all deletions; the chain holds `result` then."""

    insertions: list[Insertion]
    deletions: list[int]
    result: list[HeldRule]


def edit_rules(held: Sequence[HeldRule], wanted: Sequence[Rule]) -> Edit | None:
    """None where a handle is needed that is not known: the chain has to be written anew."""
    edit = Edit([], [], [])
    matcher = SequenceMatcher(None, [h.rule for h in held], list(wanted), autojunk=False)
    for tag, first, last, start, end in matcher.get_opcodes():
        if tag == "equal":
            edit.result.extend(held[first:last])
            continue
        new = wanted[start:end]
        anchor = held[last].handle if last < len(held) else 0
        gone = [h.handle for h in held[first:last]]
        if not all(gone) or (new and last < len(held) and not anchor):
            return None
        edit.insertions.extend(Insertion(rule, anchor) for rule in new)
        edit.result.extend(HeldRule(rule, 0) for rule in new)
        edit.deletions.extend(gone)
    return edit
