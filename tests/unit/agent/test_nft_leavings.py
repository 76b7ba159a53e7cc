"""What packets left of endpoints that are gone goes also where a round ended between its transaction and that."""

import errno
from typing import Any

from service_cases import FACTS, service_of, slice_of

from podwire.agent.proxymodes.nft import NftRules
from podwire.kernel.port import KernelError
from podwire.model.addr import Family
from podwire.model.nft import Afterwards
from podwire.model.ops import Applied, CommitNft, Failure, Op
from podwire.testing.fakekernel import FakeKernel


class Halting(FakeKernel):
    """`swept`: what each commit had to take away. `halts`: the next one is refused that, once it has changed the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.swept: list[int] = []
        self.halts = False

    async def apply(self, plan: tuple[Op, ...]) -> Applied:
        applied = await super().apply(plan)
        (op,) = plan
        assert isinstance(op, CommitNft)
        self.swept.append(sum(isinstance(command, Afterwards) for command in op.batch.commands))
        if self.halts:
            self.halts = False
            return Applied(0, (Failure(op, errno.ENOBUFS, "halted"),))
        return applied


def serve(rules: NftRules, *nodes: int) -> None:
    short: dict[str, Any] = {
        "name": "web",
        "clusterIP": "10.96.0.10",
        "ports": [{"port": 80, "targetPort": 8080}],
        "sessionAffinity": "ClientIP",
    }
    found = [{"ip": f"10.244.{n}.2", "node": f"n{n}"} for n in nodes]
    service = service_of(short, Family.IPV4)
    rules.set_service(service.key, service, (slice_of({"service": short, "endpoints": found}, Family.IPV4),))


async def fails(rules: NftRules) -> bool:
    try:
        await rules.program()
    except KernelError:
        return True
    return False


async def test_after_a_round_that_was_not_carried_out_to_its_end_all_is_checked_once() -> None:
    kernel = Halting()
    rules = NftRules(kernel, FACTS)
    serve(rules, 1, 2)
    await rules.compare()
    assert kernel.swept == [0], "where there was no table, nothing was left"
    serve(rules, 2)
    kernel.halts = True
    assert await fails(rules)
    commits = len(kernel.swept)
    assert await rules.compare() == 0, "it is no repair"
    assert await rules.compare() == 0
    assert kernel.swept[commits:] == [4], "memories and counts of both families, once"


async def test_who_takes_over_rules_checks_all_once() -> None:
    kernel = Halting()
    before = NftRules(kernel, FACTS)
    serve(before, 1, 2)
    await before.compare()
    serve(before, 2)
    kernel.halts = True
    assert await fails(before)
    after = NftRules(kernel, FACTS)
    serve(after, 2)
    commits = len(kernel.swept)
    assert await after.compare() == 0
    assert await after.compare() == 0
    assert kernel.swept[commits:] == [4]
    serve(after, 2, 3)
    assert await after.program() > 0
    assert kernel.swept[-1] == 0
