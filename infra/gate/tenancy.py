"""Other tenants' things: every mixture of two organizations' tokens, agents and paths, on every route."""

import asyncio
from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

from infra.gate.caller import Caller, ask, question
from infra.gate.proof import Proof, judge
from infra.gate.site import Site


class _Tenant(NamedTuple):
    org: str
    agent: str
    bearers: tuple[str, str]
    """One for any agent of the organization, one bound to its agent."""


class _Call(NamedTuple):
    caller: Caller
    path: str
    body: dict[str, Any] | None
    is_own: bool
    """Whether token, agent and path are of one organization."""


async def refusals(site: Site) -> Proof:
    """What mixes organizations is 403; what does not is served, or the refusals would prove nothing."""
    ours, theirs = await asyncio.gather(*(_make_tenant(site, name) for name in ("gate-ours", "gate-theirs")))
    served: list[bool] = []
    refused: list[bool] = []
    for call in (*_mixtures(site, ours, theirs), *_mixtures(site, theirs, ours)):
        status = (await ask(site.client, call.caller, call.body, path=call.path)).status
        if call.is_own:
            served.append(status == 200)
        else:
            refused.append(status == 403)
    how = "two organizations' tokens, agents and paths, each with each, on every route that asks who is calling"
    figure = f"{sum(refused)} of {len(refused)} mixtures refused with 403"
    figure += f", {sum(served)} of {len(served)} calls of their own served"
    return judge(all(refused) and all(served), how, figure)


def _mixtures(site: Site, home: _Tenant, away: _Tenant) -> Iterator[_Call]:
    """All calls with a token of `home`."""
    for bearer, agent, org in product(home.bearers, (home.agent, away.agent), (None, home.org, away.org)):
        caller = Caller(site.house.url, bearer, agent)
        is_own = agent == home.agent and org in {None, home.org}
        prefix = "/v1" if org is None else f"/v1/orgs/{org}"
        for is_streaming in (False, True):
            body = question("Whose is this?", is_streaming=is_streaming)
            yield _Call(caller, f"{prefix}/chat/completions", body, is_own)
        probe = "/internal/auth-probe" if org is None else "/auth-probe"
        for path in (probe, *(("/models", "/models/gpt-4o-mini") if org is None else ())):
            yield _Call(caller, prefix + path, None, is_own)


async def _make_tenant(site: Site, name: str) -> _Tenant:
    org = (await site.house.ctl("org", "create", name))["org_id"]
    agent = (await site.house.ctl("agent", "register", "clerk", "--org", org))["agent_id"]
    free = await site.house.ctl("token", "mint", "--org", org)
    bound = await site.house.ctl("token", "mint", "--org", org, "--agent", agent)
    return _Tenant(org, agent, (free["token"], bound["token"]))
