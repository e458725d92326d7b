"""The way to the collector: OpenTelemetry's own exporters, over HTTP or gRPC, told everything by the settings."""

import logging
from typing import TYPE_CHECKING
from urllib.parse import unquote

from opentelemetry.exporter.otlp.proto.http import Compression
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace.export import SpanExporter

from ibex.config import Settings
from ibex.errors import ConfigurationError

if TYPE_CHECKING:
    from grpc import ChannelCredentials

TRACES_PATH = "/v1/traces"
MAX_REASON = 300
"""Characters of a reason that is logged."""


class FirstWords(logging.Handler):
    """Why a batch did not arrive: what the exporters' library said first of it. Then it only says that it gave up.

    Its lines go nowhere else: there is one for every try.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.text = "unknown"
        self._is_listening = True

    def listen(self) -> None:
        """Another batch is tried."""
        self._is_listening = True

    def emit(self, record: logging.LogRecord) -> None:
        """Called by the exporter's thread."""
        if self._is_listening:
            self.text = " ".join(record.getMessage().split())[:MAX_REASON]
            self._is_listening = False


_first_words = FirstWords()


def listen_to_exporters() -> FirstWords:
    """Take over the exporters' own log lines, which come once a try."""
    logger = logging.getLogger("opentelemetry.exporter")
    logger.handlers[:] = [_first_words]
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    return _first_words


def open_exporter(settings: Settings) -> SpanExporter:
    """The exporter the settings describe; nothing is connected yet.

    Raises ConfigurationError for headers that are none, and when gRPC is asked for and not installed.
    """
    return _open_grpc(settings) if settings.otel_protocol == "grpc" else _open_http(settings)


def _open_http(settings: Settings) -> SpanExporter:
    endpoint = settings.otel_traces_endpoint or (settings.otel_endpoint or "").rstrip("/") + TRACES_PATH
    return OTLPSpanExporter(
        endpoint,
        certificate_file=_text(settings.otel_certificate),
        client_certificate_file=_text(settings.otel_client_certificate),
        client_key_file=_text(settings.otel_client_key),
        headers=_read_headers(settings),
        timeout=settings.otel_timeout_ms / 1e3,
        compression=Compression.Gzip if settings.otel_compression == "gzip" else Compression.NoCompression,
    )


def _open_grpc(settings: Settings) -> SpanExporter:
    try:
        import grpc
        from opentelemetry.exporter.otlp.proto.grpc import trace_exporter
    except ImportError:
        raise ConfigurationError(
            "OTEL_EXPORTER_OTLP_PROTOCOL=grpc needs gRPC, which is not installed.",
            hint="Install ibex with the extra otlp-grpc, or use http/protobuf.",
        ) from None
    endpoint = settings.otel_traces_endpoint or settings.otel_endpoint or ""
    is_insecure = endpoint.startswith("http://")
    return trace_exporter.OTLPSpanExporter(
        endpoint,
        insecure=is_insecure,
        credentials=None if is_insecure else _read_credentials(settings),
        headers=_read_headers(settings),
        timeout=settings.otel_timeout_ms / 1e3,
        compression=grpc.Compression.Gzip if settings.otel_compression == "gzip" else grpc.Compression.NoCompression,
    )


def _read_credentials(settings: Settings) -> "ChannelCredentials":
    import grpc

    files = (settings.otel_certificate, settings.otel_client_key, settings.otel_client_certificate)
    try:
        root, key, chain = (None if path is None else path.read_bytes() for path in files)
    except OSError as error:
        raise ConfigurationError(f"A certificate for the collector cannot be read: {error.strerror}.") from None
    return grpc.ssl_channel_credentials(root, key, chain)


def _read_headers(settings: Settings) -> dict[str, str]:
    """`name=value` pairs, percent-encoded, as the specification has them. The message never quotes one."""
    headers = {}
    text = "" if settings.otel_headers is None else settings.otel_headers.get_secret_value()
    for pair in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = pair.partition("=")
        if not equals or not name.strip():
            raise ConfigurationError(
                "OTEL_EXPORTER_OTLP_HEADERS is not a list of headers.", hint="Write name=value,name=value."
            )
        headers[unquote(name.strip()).lower()] = unquote(value.strip())
    return headers


def _text(path: object) -> str | None:
    return None if path is None else str(path)
