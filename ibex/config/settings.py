"""The settings model: everything an operator can set, with its default and one line of help."""

import ipaddress
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    model_validator,
)

EMBEDDED = "embedded"
"""The DSN of a store that this data directory runs itself."""

LOOPBACK = ("127.0.0.1", "localhost", "::1")

_CENTURY_DAYS = 36_500
"""The longest span that is set: what is far longer is no `timedelta` and no interval of Postgres any more."""

Environment = Literal["development", "staging", "production"]


class Secret(SecretStr):
    """A value whose repr, str and format are masked."""

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)


def _split_commas(value: object) -> object:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _dsn(form: str, *schemes: str) -> AfterValidator:
    """Refuses what is no address of a store; the message never quotes it, since it may hold a password."""

    def check(dsn: Secret) -> Secret:
        text = dsn.get_secret_value()
        if text != EMBEDDED and text.partition("://")[0] not in schemes:
            raise ValueError(f"write {form}, or `{EMBEDDED}`")
        return dsn

    return AfterValidator(check)


def _check_collector(url: str) -> str:
    """Refuses what is no plain address; the message never quotes it, and it may not hold a secret."""
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname or "@" in parts.netloc or parts.query:
        raise ValueError("write http(s)://host:port; what proves who ibex is goes into OTEL_EXPORTER_OTLP_HEADERS")
    return url


def _check_watchdog(seconds: float) -> float:
    """Refuses what a healthy child could be ended for: one speaks each second, and later under load."""
    if not (seconds == 0 or seconds >= 5):
        raise ValueError("write 5 or more seconds, since a busy process may be silent for a while; 0 is off")
    return seconds


PostgresDsn = Annotated[Secret, _dsn("postgresql://user:password@host:5432/database", "postgresql", "postgres")]
RedisUrl = Annotated[
    Secret, _dsn("redis://[user:password@]host[:port][/db], rediss://… or unix:///path", "redis", "rediss", "unix")
]
ClickHouseDsn = Annotated[
    Secret, _dsn("http(s)://user:password@host:8123/database", "http", "https", "clickhouse", "clickhouses")
]
CollectorUrl = Annotated[str, AfterValidator(_check_collector)]
WatchdogSeconds = Annotated[float, AfterValidator(_check_watchdog)]
CommaList = Annotated[tuple[str, ...], BeforeValidator(_split_commas)]


def _setting(default: Any, line: str, *names: str, section: str | None = None, **limits: Any) -> Any:
    """A field with its one line of help; `names` are the environment names besides `IBEX_<FIELD>`."""
    extra: dict[str, Any] = {"names": names, "section": section}
    return Field(default, description=line, json_schema_extra=extra, **limits)


class Settings(BaseModel):
    """Everything an operator can set. `.env.example` and docs/configuration.md are compared with this by a test."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    env: Environment = _setting("development", "development, staging or production", section="Where it runs")
    data_dir: Path = _setting(Path(".ibex"), "where the journal, the embedded engines' data and the run files lie")
    host: str = _setting("127.0.0.1", "address to listen on; development listens on loopback only")
    allow_public_bind: bool = _setting(False, "outside development: allow an address that other machines reach")
    port: int = _setting(8080, "port to listen on", ge=0, le=65535)
    workers: int = _setting(2, "worker processes, each one event loop", ge=1, le=128)
    metrics_host: str = _setting("127.0.0.1", "address of /metrics outside development")
    metrics_port: int = _setting(9464, "port of /metrics outside development", ge=0, le=65535)
    shutdown_timeout: float = _setting(30.0, "how long a stopping worker lets requests finish (s)", ge=0)
    shutdown_delay: float = _setting(
        0.0,
        "how long before that /ready says 503 while all is served, each answer the last of its connection (s)",
        ge=0,
        le=3600,
    )
    watchdog_seconds: WatchdogSeconds = _setting(
        30.0, "a child process that hangs for so long is ended and started again (s), 5 or more; 0 is off"
    )

    postgres_dsn: PostgresDsn = _setting(
        Secret(EMBEDDED),
        "Postgres as the application's role; `embedded` runs one here",
        "POSTGRES_DSN",
        section="Stores",
    )
    postgres_admin_dsn: PostgresDsn = _setting(
        Secret(EMBEDDED), "Postgres as the owner: migrations and operator commands"
    )
    redis_url: RedisUrl = _setting(Secret(EMBEDDED), "Redis or Valkey", "REDIS_URL")
    clickhouse_dsn: ClickHouseDsn = _setting(Secret(EMBEDDED), "ClickHouse's HTTP interface", "CLICKHOUSE_DSN")
    postgres_pool_size: int = _setting(4, "Postgres connections a worker may hold", ge=1, le=100)
    redis_deadline_ms: int = _setting(20, "how long a request waits for Redis (ms)", ge=1, le=1000)

    llm_mode: Literal["live", "sandbox"] | None = _setting(
        None, "live or sandbox; unset: live when a key is set, else sandbox (development only)", section="Providers"
    )
    openai_api_key: Secret | None = _setting(None, "the key ibex presents to OpenAI", "OPENAI_API_KEY")
    openai_base_url: str = _setting(
        "https://api.openai.com/v1", "OpenAI or whatever speaks its dialect", "OPENAI_BASE_URL"
    )
    openai_models: CommaList = _setting(("*",), "models this provider serves, as globs")
    openai_stream_usage: Literal["ask", "never"] = _setting("ask", "whether to ask for usage at the end of a stream")
    provider_connect_seconds: float = _setting(5.0, "deadline to connect (s)", gt=0)
    provider_first_byte_seconds: float = _setting(120.0, "deadline to the first byte of an answer (s)", gt=0)
    provider_idle_seconds: float = _setting(60.0, "deadline between two bytes of an answer (s)", gt=0)
    provider_retries: int = _setting(3, "retries before the first byte", ge=0, le=10)
    provider_retry_wait_seconds: float = _setting(30.0, "all waits between retries together (s)", ge=0)
    provider_connection_seconds: float = _setting(
        120.0, "a connection older than this takes no further request, so that DNS is followed (s)", gt=0
    )
    stream_max_seconds: float = _setting(3600.0, "the longest stream (s)", gt=0)
    https_proxy: Secret | None = _setting(
        None, "HTTP proxy through which https upstreams are reached (CONNECT)", "HTTPS_PROXY", "https_proxy"
    )
    no_proxy: CommaList = _setting(
        LOOPBACK, "hosts, .domains, addresses and CIDRs reached without it; * is all", "NO_PROXY", "no_proxy"
    )
    ssl_cert_file: Path | None = _setting(
        None, "PEM file of further authorities that https upstreams may be signed by", "SSL_CERT_FILE"
    )
    sandbox_gap_ms: float = _setting(5.0, "the sandbox's gap between two stream events (ms)", ge=0)

    max_body_bytes: int = _setting(1 << 20, "largest request body (bytes)", ge=1024, section="The edge")
    max_connections: int = _setting(10_000, "client connections a worker holds", ge=1)
    max_connections_per_address: int = _setting(0, "client connections of one address; 0 is off", ge=0)
    trusted_proxies: CommaList = _setting((), "CIDRs whose X-Forwarded-For is believed")
    head_seconds: float = _setting(10.0, "deadline for a request's head (s)", gt=0)
    body_seconds: float = _setting(30.0, "deadline for a request's body (s)", gt=0)
    body_bytes_per_second: int = _setting(1024, "least rate of a body from a sixth of that on (bytes/s)", ge=1)
    slow_client_seconds: float = _setting(
        60.0, "a client that takes nothing of its reply for longer has left (s)", gt=0
    )

    auth_max_stale_seconds: float = _setting(
        900.0,
        "how long known callers are served while Postgres is away (s)",
        "IBEX_AUTH_MAX_STALE",
        ge=0,
        section="Identity",
    )
    auth_cache_size: int = _setting(5000, "verified callers a worker remembers", ge=1)
    rate_limit_rpm: int = _setting(60, "requests a minute of an organization without a limit of its own", ge=1)
    rate_limit_on_outage: Literal["local", "refuse"] = _setting("local", "what Redis' absence means for limits")

    journal_sync: Literal["none", "full"] = _setting(
        "none", "full: each turn is on the disk before its reply ends", section="The journal"
    )
    journal_segment_bytes: int = _setting(32 << 20, "a segment is closed at this size (bytes)", ge=4096)
    journal_segment_seconds: float = _setting(10.0, "a segment is closed at this age (s)", gt=0)
    journal_max_bytes: int = _setting(4 << 30, "new chats are refused when the journal is larger (bytes)", ge=1 << 20)
    journal_min_free_bytes: int = _setting(512 << 20, "new chats are refused when the disk has less free (bytes)", ge=0)
    journal_max_age_seconds: float = _setting(
        0.0, "new chats are refused when a turn has waited for longer (s); 0 is off", ge=0
    )
    capture_content: bool = _setting(False, "keep the text of prompts and replies in checkpoints")
    session_idle_minutes: float = _setting(
        45.0, "a session idle for longer is abandoned (min)", gt=0, le=_CENTURY_DAYS * 1440
    )
    checkpoint_retention_days: int = _setting(
        0,
        "checkpoints recorded longer ago are deleted (days); 0 keeps them",
        "IBEX_CHECKPOINT_RETENTION",
        ge=0,
        le=_CENTURY_DAYS,
    )

    log_level: Literal["debug", "info", "warning", "error"] = _setting(
        "info", "least level logged", section="Telemetry"
    )
    log_format: Literal["json", "text"] | None = _setting(None, "unset: text in development, else json")
    access_log: bool = _setting(True, "one line a request")
    otel_endpoint: CollectorUrl | None = _setting(
        None, "OTLP collector; /v1/traces is added over HTTP; unset: spans go nowhere", "OTEL_EXPORTER_OTLP_ENDPOINT"
    )
    otel_traces_endpoint: CollectorUrl | None = _setting(
        None, "the same for traces alone, taken as it stands", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
    )
    otel_protocol: Literal["http/protobuf", "grpc"] = _setting(
        "http/protobuf",
        "how the collector is spoken to; grpc needs the extra otlp-grpc",
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL",
        "OTEL_EXPORTER_OTLP_PROTOCOL",
    )
    otel_headers: Secret | None = _setting(
        None,
        "headers for the collector: name=value, percent-encoded, separated by commas",
        "OTEL_EXPORTER_OTLP_TRACES_HEADERS",
        "OTEL_EXPORTER_OTLP_HEADERS",
    )
    otel_compression: Literal["none", "gzip"] = _setting(
        "none", "how spans are packed", "OTEL_EXPORTER_OTLP_TRACES_COMPRESSION", "OTEL_EXPORTER_OTLP_COMPRESSION"
    )
    otel_timeout_ms: int = _setting(
        10_000,
        "how long the collector may take for a batch, retries included (ms)",
        "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT",
        "OTEL_EXPORTER_OTLP_TIMEOUT",
        ge=1,
    )
    otel_certificate: Path | None = _setting(
        None,
        "PEM file of the authorities the collector may be signed by",
        "OTEL_EXPORTER_OTLP_TRACES_CERTIFICATE",
        "OTEL_EXPORTER_OTLP_CERTIFICATE",
    )
    otel_client_certificate: Path | None = _setting(
        None,
        "PEM file of ibex's own certificate for the collector",
        "OTEL_EXPORTER_OTLP_TRACES_CLIENT_CERTIFICATE",
        "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE",
    )
    otel_client_key: Path | None = _setting(
        None, "its key", "OTEL_EXPORTER_OTLP_TRACES_CLIENT_KEY", "OTEL_EXPORTER_OTLP_CLIENT_KEY"
    )
    otel_service_name: str | None = _setting(None, "whose spans these are; unset: ibex", "OTEL_SERVICE_NAME")
    otel_resource_attributes: CommaList = _setting(
        (), "what else is known of whose they are: name=value, percent-encoded", "OTEL_RESOURCE_ATTRIBUTES"
    )
    otel_sample_ratio: float = _setting(
        0.01,
        "share of requests without a parent whose spans are kept; failed ones always are",
        "OTEL_TRACES_SAMPLER_ARG",
        ge=0,
        le=1,
    )
    otel_sdk_disabled: bool = _setting(False, "true: no spans, whatever else is set", "OTEL_SDK_DISABLED")

    @model_validator(mode="after")
    def _check_environment(self) -> Self:
        if self.env == "development":
            if not _is_loopback(self.host):
                raise ValueError(
                    f"IBEX_HOST={self.host}: development listens on loopback only;"
                    " set IBEX_ENV=production to listen elsewhere"
                )
            return self
        faults = [
            f"{name}={host}: other machines reach that address;"
            " set IBEX_ALLOW_PUBLIC_BIND=true if they are meant to, or listen on 127.0.0.1"
            for name, host in (("IBEX_HOST", self.host), ("IBEX_METRICS_HOST", self.metrics_host))
            if not (self.allow_public_bind or _is_loopback(host))
        ]
        if self.resolved_llm_mode == "sandbox":
            faults.append(
                "IBEX_LLM_MODE: the sandbox serves development only; set OPENAI_API_KEY,"
                " or IBEX_LLM_MODE=live for an upstream that needs no key"
            )
        if faults:
            raise ValueError("\n".join(faults))
        return self

    @property
    def is_development(self) -> bool:
        """Whether the development seed and the sandbox are allowed."""
        return self.env == "development"

    @property
    def resolved_llm_mode(self) -> Literal["live", "sandbox"]:
        """Where chats go: `llm_mode`, else live when there is a key."""
        return self.llm_mode or ("live" if self.openai_api_key is not None else "sandbox")

    @property
    def resolved_log_format(self) -> Literal["json", "text"]:
        """How log lines look: `log_format`, else by environment."""
        return self.log_format or ("text" if self.is_development else "json")

    @property
    def run_dir(self) -> Path:
        """Where locks, sockets and the addresses of running engines lie."""
        return self.data_dir / "run"

    @property
    def otel_exports(self) -> bool:
        """Whether spans go anywhere."""
        return bool(self.otel_endpoint or self.otel_traces_endpoint) and not self.otel_sdk_disabled

    @property
    def journal_dir(self) -> Path:
        """Where finished turns wait for delivery."""
        return self.data_dir / "journal"


def _is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address to listen on; a name may mean any address, but for localhost."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def environment_names(field: str) -> tuple[str, ...]:
    """The environment names of a setting, the usual one of its own first."""
    extra = Settings.model_fields[field].json_schema_extra
    names = extra.get("names", ()) if isinstance(extra, dict) else ()
    return (f"IBEX_{field.upper()}", *(str(name) for name in names))  # type: ignore[union-attr]


def is_secret(field: str) -> bool:
    """Whether a setting's value must never be shown, and may be given as a file."""
    return "Secret" in str(Settings.model_fields[field].annotation)
