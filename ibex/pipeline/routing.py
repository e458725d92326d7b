"""Which provider serves a model."""

from collections.abc import Sequence

from ibex.errors import ProviderNotConfigured
from ibex.providers.base import Provider

KNOWN_MODELS = frozenset(
    {
        "gpt-3.5-turbo",
        "gpt-4",
        "gpt-4-turbo",
        "gpt-4.1",
        "gpt-4.1-mini",
        "gpt-4.1-nano",
        "gpt-4o",
        "gpt-4o-mini",
        "gpt-5",
        "gpt-5-mini",
        "gpt-5-nano",
        "o1",
        "o3",
        "o3-mini",
        "o4-mini",
    }
)
"""Models that metrics name; any other is `other`."""


class Router:
    """The providers there are, asked in order."""

    def __init__(self, providers: Sequence[Provider]) -> None:
        self._providers = tuple(providers)

    @staticmethod
    def label(model: str) -> str:
        """The model as the label of a metric: from a closed set, since callers may name models as they please."""
        return model if model in KNOWN_MODELS else "other"

    def choose(self, model: str) -> Provider:
        """The first provider that serves this model; raises ProviderNotConfigured when none does."""
        for provider in self._providers:
            if provider.serves(model):
                return provider
        if not self._providers:
            raise ProviderNotConfigured("No provider is configured. Set OPENAI_API_KEY.", param="model")
        raise ProviderNotConfigured(param="model")
