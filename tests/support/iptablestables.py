"""iptables' tables as values: what `iptables-restore --noflush` makes of a text, and what `iptables-save` shows then."""

from collections.abc import Iterable

from podwire.plan.iptables import ChainRef, Chains, parse_save
from podwire.plan.iptables_rules import HOOKS, PREFIX

Tables = dict[ChainRef, list[str]]


class Refused(Exception):
    """What iptables-restore would not do."""


def empty() -> Tables:
    return {(table, hook): [] for table, hooks in HOOKS.items() for hook, *_ in hooks}


def execute(tables: Tables, text: str) -> Tables:
    """What `iptables-restore --noflush` makes of a text."""
    state = {ref: list(lines) for ref, lines in tables.items()}
    table = ""
    for line in filter(None, text.splitlines()):
        word, _, rest = line.partition(" ")
        chain, _, rule = rest.partition(" ")
        match word:
            case "COMMIT":
                for lines in state.values():
                    _check(state, lines)
            case "-A":
                state[table, chain].append(rule)
            case "-D":
                state[table, chain].remove(rule)
            case "-I":
                position, _, rule = rule.partition(" ")
                state[table, chain].insert(int(position) - 1, rule)
            case "-X":
                if state[table, chain]:
                    raise Refused(f"{chain} is not empty")
                del state[table, chain]
            case _ if word.startswith(":"):
                state[table, word[1:]] = []
            case _ if word.startswith("*"):
                table = word[1:]
            case _:
                raise Refused(line)
    return state


def _check(state: Tables, lines: Iterable[str]) -> None:
    names = {name for _, name in state}
    for line in lines:
        words = line.split()
        target = next((words[i + 1] for i, w in enumerate(words) if w in ("-j", "-g")), "")
        if target.startswith(PREFIX) and target not in names:
            raise Refused(f"{line} leads to a chain that is not there")


def saved(tables: Tables) -> str:
    """The same as `iptables-save` shows it."""
    text = []
    for table in HOOKS:
        chains = {name: lines for (t, name), lines in tables.items() if t == table}
        text += [f"*{table}", *(f":{name} {'-' if name.startswith(PREFIX) else 'ACCEPT'} [0:0]" for name in chains)]
        text += [f"-A {name} {line}" for name, lines in chains.items() for line in lines]
        text.append("COMMIT")
    return "\n".join(text) + "\n"


def held(tables: Tables) -> Chains:
    return parse_save(saved(tables))
