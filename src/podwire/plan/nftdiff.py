"""Mark and sweep over rulesets, and the order in which changes to a table are safe.

nftables takes a transaction whole. It may still have to be cut (a socket's buffer has an end), so commands stand in an order
in which each prefix leaves working rules: first what others refer to (sets, chains, and the elements that no packet finds
yet), then the elements whose change leads packets there, last what nobody is led to any more.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from itertools import chain as concat

from podwire.model.nft import (
    AddChain,
    AddElements,
    AddSet,
    AddTable,
    Batch,
    ChainState,
    Command,
    Data,
    DelChain,
    DelElements,
    DelSet,
    DelTable,
    Element,
    NftSet,
    ReplaceElements,
    Rule,
    Ruleset,
    SetRules,
    SetState,
    TableRef,
    TableState,
)
from podwire.model.nftexpr import Unknown


@dataclass(slots=True)
class ElementChanges:
    """What changes in one set. `gone` elements come without data."""

    set: NftSet
    added: list[Element] = field(default_factory=list)
    replaced: list[Element] = field(default_factory=list)
    gone: list[Element] = field(default_factory=list)
    comments: Mapping[bytes, str] = field(default_factory=dict)
    """Of all elements of the set, as far as they have one."""

    def said_of(self, elements: Iterable[Element]) -> Mapping[bytes, str]:
        """The comments of some elements."""
        return {key: self.comments[key] for key, _ in elements if key in self.comments} if self.comments else {}

    def __bool__(self) -> bool:
        return bool(self.added or self.replaced or self.gone)


@dataclass(frozen=True, slots=True)
class RuleChanges:
    """Chains whose rules change, with all their rules: as they have to be before elements change (whatever led a packet
    somewhere before, or will, does), and after it."""

    before: Mapping[str, tuple[Rule, ...]] = field(default_factory=dict)
    after: Mapping[str, tuple[Rule, ...]] = field(default_factory=dict)


def order_changes(
    table: TableRef, creates: Sequence[Command], rules: RuleChanges, elements: Iterable[ElementChanges]
) -> tuple[list[Command], list[Command], list[Command]]:
    """(make, lead, remove): three phases. Over several tables, run each phase for all of them before the next."""
    make: list[Command] = [*creates, *(SetRules(table, chain, found) for chain, found in rules.before.items())]
    lead: list[Command] = []
    remove: list[Command] = []
    for change in elements:
        of = change.set
        if change.added:
            make.append(AddElements(table, of, tuple(change.added), change.said_of(change.added)))
        if change.replaced:
            lead.append(ReplaceElements(table, of, tuple(change.replaced), change.said_of(change.replaced)))
        if change.gone:
            remove.append(DelElements(table, of, tuple(change.gone)))
    # Sets are listed with what leads to others last (services after its endpoints): it goes first on the way out.
    remove.reverse()
    remove += [SetRules(table, chain, found) for chain, found in rules.after.items()]
    return make, lead, remove


def diff_ruleset(desired: Ruleset, observed: Ruleset) -> Batch:
    """The smallest transaction from `observed` to `desired`; elements that stay keep their counters, and dynamic sets theirs.

    Only tables that `desired` names are touched. A table whose sets or base chains have other types is made anew."""
    phases = [_diff_table(ref, table, observed.tables.get(ref)) for ref, table in desired.tables.items()]
    return Batch(tuple(concat.from_iterable(concat.from_iterable(zip(*phases, strict=True)))))


Phases = tuple[list[Command], list[Command], list[Command]]


def _diff_table(ref: TableRef, desired: TableState, observed: TableState | None) -> Phases:
    anew: list[Command] = []
    if observed is not None and not _compatible(desired, observed):
        anew, observed = [DelTable(ref)], None
    if observed is None or observed.dormant:
        anew.append(AddTable(ref))
    observed = observed or TableState()
    creates = [*anew, *(AddSet(ref, s.set) for name, s in desired.sets.items() if name not in observed.sets)]
    added = [c for name, c in desired.chains.items() if name not in observed.chains]
    creates += [AddChain(ref, c.chain) for c in added]
    creates += [SetRules(ref, c.chain.name, c.rules) for c in added]
    elements = [_diff_elements(s, observed.sets.get(name)) for name, s in desired.sets.items() if not s.set.dynamic]
    rules = _changed_rules(desired.chains, observed.chains)
    make, lead, remove = order_changes(ref, creates, rules, [e for e in elements if e])
    gone = [name for name in observed.chains if name not in desired.chains]
    remove += [SetRules(ref, name, ()) for name in gone]
    remove += [DelChain(ref, name) for name in gone]
    remove += [DelSet(ref, name) for name in observed.sets if name not in desired.sets]
    return make, lead, remove


def _compatible(desired: TableState, observed: TableState) -> bool:
    """Whether everything that both have is of one type, so that it can be changed in place."""
    sets = (observed.sets[n].set == s.set for n, s in desired.sets.items() if n in observed.sets)
    chains = (observed.chains[n].chain == c.chain for n, c in desired.chains.items() if n in observed.chains)
    return all(sets) and all(chains)


def _changed_rules(desired: Mapping[str, ChainState], observed: Mapping[str, ChainState]) -> RuleChanges:
    before: dict[str, tuple[Rule, ...]] = {}
    after: dict[str, tuple[Rule, ...]] = {}
    for name, chain in desired.items():
        held = observed[name].rules if name in observed else chain.rules
        if held != chain.rules:
            both = _merged(held, chain.rules)
            if both != held:
                before[name] = both
            if both != chain.rules:
                after[name] = chain.rules
    return RuleChanges(before, after)


def _merged(held: Sequence[Rule], wanted: Sequence[Rule]) -> tuple[Rule, ...]:
    """All rules of both in an order that fits both, but those of others that could not be written again."""
    merged: list[Rule] = []
    for tag, first, last, start, end in SequenceMatcher(None, held, wanted, autojunk=False).get_opcodes():
        if tag != "equal":
            merged += (rule for rule in held[first:last] if not any(isinstance(e, Unknown) for e in rule.expressions))
        merged += wanted[start:end]
    return tuple(merged)


def _diff_elements(desired: SetState, observed: SetState | None) -> ElementChanges:
    changes = ElementChanges(desired.set, comments=desired.comments)
    held: Mapping[bytes, Data] = observed.elements if observed is not None else {}
    if not held:
        changes.added = list(desired.elements.items())
        return changes
    for key, data in desired.elements.items():
        if key not in held:
            changes.added.append((key, data))
        elif held[key] != data:
            changes.replaced.append((key, data))
    changes.gone = [(key, None) for key in held if key not in desired.elements]
    return changes
