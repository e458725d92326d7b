"""Which models there are to ask for: the providers' own lists, kept for a while."""

import asyncio
from collections.abc import Sequence
from time import monotonic
from typing import Final

from ibex.errors import ModelNotFound, ProviderNotConfigured, ProviderTimeout, RequestError
from ibex.providers.base import Provider
from ibex.providers.models import Model

FRESH_SECONDS: Final = 300.0
"""How long a list is given out without asking again."""
FETCH_SECONDS: Final = 10.0
"""How long a provider may take to tell its list, retries and all."""
PAUSE_SECONDS: Final = 10.0
"""How long a provider that did not tell it is left alone, when an older list can be given out meanwhile."""


class ModelCatalog:
    """The models of all providers, in the providers' order; a model that two have is the first one's."""

    def __init__(self, providers: Sequence[Provider], *, fresh_seconds: float = FRESH_SECONDS) -> None:
        self._lists = tuple(_ModelList(provider, fresh_seconds) for provider in providers)

    async def list_models(self) -> list[Model]:
        """Every model that is served.

        Raises ProviderNotConfigured without a provider, and a provider's error when it never told its list.
        """
        if not self._lists:
            raise ProviderNotConfigured("No provider is configured. Set OPENAI_API_KEY.")
        found: dict[str, Model] = {}
        for models in await asyncio.gather(*(each.get() for each in self._lists)):
            for model in models:
                found.setdefault(model.id, model)
        return list(found.values())

    async def find(self, model_id: str) -> Model:
        """The model of this id; raises ModelNotFound, and what `list_models` raises."""
        for model in await self.list_models():
            if model.id == model_id:
                return model
        raise ModelNotFound(param="model")


class _ModelList:
    """One provider's list. All who ask while it is being fetched wait for the same answer."""

    def __init__(self, provider: Provider, fresh_seconds: float) -> None:
        self._provider = provider
        self._fresh_seconds = fresh_seconds
        self._models: tuple[Model, ...] = ()
        self._is_known = False
        self._fresh_until = 0.0
        self._fetch: asyncio.Task[RequestError | None] | None = None

    async def get(self) -> tuple[Model, ...]:
        """The list, at most 5 min old, or the last one known while the provider is away."""
        if not self._is_known or monotonic() >= self._fresh_until:
            if self._fetch is None:
                self._fetch = asyncio.get_running_loop().create_task(self._refresh(), name="model list")
                self._fetch.add_done_callback(self._end_fetch)
            error = await asyncio.shield(self._fetch)  # whoever leaves meanwhile takes nothing from the others
            if error is not None and not self._is_known:
                raise error
        return self._models

    async def _refresh(self) -> RequestError | None:
        """Ask the provider; answers what went wrong."""
        error: RequestError | None = None
        try:
            async with asyncio.timeout(FETCH_SECONDS):
                self._models = await self._provider.list_models()
            self._is_known = True
        except TimeoutError:
            error = ProviderTimeout()
        except RequestError as failure:
            error = failure
        self._fresh_until = monotonic() + (self._fresh_seconds if error is None else PAUSE_SECONDS)
        return error

    def _end_fetch(self, _fetch: "asyncio.Task[RequestError | None]") -> None:
        self._fetch = None
