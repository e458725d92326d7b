"""The routes that only look something up: which models there are, and who is asking."""

from typing import Any
from urllib.parse import unquote

from ibex.domain.identity import Permission, Principal, permission_names
from ibex.pipeline.authentication import Authenticator
from ibex.pipeline.models import ModelCatalog
from ibex.pipeline.tenancy import check_path_organization
from ibex.providers.models import Model
from ibex.server.edge.answers import answer_json
from ibex.server.edge.inbound import Inbound
from ibex.server.edge.wire import WireReply
from ibex.telemetry import Stage

NO_PERMISSIONS = Permission(0)


class Lookups:
    """Each needs a token and an agent, and neither permissions nor a place in a rate limit."""

    def __init__(self, authenticator: Authenticator, catalog: ModelCatalog) -> None:
        self._authenticator = authenticator
        self._catalog = catalog

    async def list_models(self, inbound: Inbound, reply: WireReply) -> None:
        """OpenAI's list of the models that are served."""
        await self._identify(inbound)
        models = await self._catalog.list_models()
        await answer_json(reply, 200, {"object": "list", "data": [_describe(model) for model in models]})

    async def show_model(self, inbound: Inbound, reply: WireReply, path_parameter: str) -> None:
        """One of them."""
        await self._identify(inbound)
        await answer_json(reply, 200, _describe(await self._catalog.find(unquote(path_parameter))))

    async def probe(self, inbound: Inbound, reply: WireReply, path_parameter: str | None = None) -> None:
        """Who is asking, as ibex sees it."""
        principal = await self._identify(inbound)
        check_path_organization(principal, path_parameter)
        described = {
            "org_id": str(principal.org_id),
            "agent_id": str(principal.agent_id),
            "permissions": permission_names(principal.permissions),
        }
        await answer_json(reply, 200, described)

    async def _identify(self, inbound: Inbound) -> Principal:
        headers = inbound.head.headers
        principal = await self._authenticator.authenticate(
            headers.get("Authorization"), headers.get("X-IBEX-Agent-ID"), inbound.address, needs=NO_PERMISSIONS
        )
        inbound.clock.finish(Stage.AUTHENTICATION)
        return principal


def _describe(model: Model) -> dict[str, Any]:
    """OpenAI's model object."""
    return {"id": model.id, "object": "model", "created": model.created, "owned_by": model.owned_by}
