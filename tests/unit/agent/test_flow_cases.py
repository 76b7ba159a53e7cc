"""The case files of tracked UDP connections: which the agent forgets after a change; and that the oracle leads them where the
case says that they went."""

import pytest
from service_cases import feed
from service_checks import Objects, promised
from service_histories import FlowCase, changed, load_flow_cases

from podwire.model.flow import DST_NAT, Flow
from podwire.testing import FakeKernel
from podwire.trace.oracle import Outcome

CASES = list(load_flow_cases())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
async def test_what_the_change_makes_be_forgotten(case: FlowCase) -> None:
    kernel = FakeKernel()
    flows = []
    for number, flow in enumerate(case.flows):
        original, reply = flow.tuples(4000 + number)
        flows.append(Flow(original, reply, status=DST_NAT if flow.endpoint else 0))

    async def make() -> None:
        kernel.host.flows += flows

    async with changed(kernel, case, make):
        for flow, made in zip(case.flows, flows, strict=True):
            assert (made not in kernel.host.flows) is flow.forgotten, flow.label


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_connections_went_where_the_oracle_leads_them(case: FlowCase) -> None:
    objects = Objects()
    for item in case.before:
        feed(objects, item, case.family)
    for flow in case.flows:
        found = promised(objects.cluster(case.facts), flow.sent)
        if flow.endpoint is None:
            assert found.outcome is Outcome.UNTOUCHED, flow.label
        else:
            assert flow.endpoint in {(str(ip), port) for ip, port in found.targets}, flow.label
