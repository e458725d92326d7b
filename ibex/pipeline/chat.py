"""The life of a chat request: authenticate → admit → directive → read → weave → provider → relay → record."""

import asyncio
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from typing import Any
from uuid import UUID

from ibex.domain.chat import ChatRequest, read_chat, weave
from ibex.domain.completions import Fate, StreamReader, read_reply_facts, read_usage
from ibex.domain.directives import Directive
from ibex.domain.identity import Principal
from ibex.domain.turns import TurnId, mint_turn_id
from ibex.errors import (
    InternalError,
    ProviderUnavailable,
    RequestError,
    ServiceDegraded,
    StoreUnavailable,
    ValidationFailed,
)
from ibex.pipeline.authentication import Authenticator, read_bearer
from ibex.pipeline.directives import DirectiveBook
from ibex.pipeline.idempotency import MAX_REPLY_BYTES, Claim, Idempotency, StoredReply, is_idempotency_key
from ibex.pipeline.rate_limiting import RateLimiter
from ibex.pipeline.recording import OpenTurn, TurnFacts
from ibex.pipeline.reply import Call, Reply
from ibex.pipeline.routing import Router
from ibex.pipeline.sessions import check_session, choose_session
from ibex.pipeline.tenancy import check_path_organization
from ibex.providers.base import Provider, ProviderCall, ProviderReply
from ibex.providers.events import event_data
from ibex.stores.journal.writer import Journal
from ibex.telemetry import Metrics, Stage

MAX_HELD_BYTES = 1 << 20
"""A JSON reply up to this size is held with its head until its turn is kept; of a larger one its last byte is."""
STREAM_HEADERS = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
REPLAYED_HEADERS = (
    "Content-Type",
    "openai-processing-ms",
    "X-Provider-Request-ID",
    "Cache-Control",
    "X-Accel-Buffering",
)


@dataclass(slots=True, eq=False)
class Exchange:
    """One request that has been read, and the way back."""

    call: Call
    reply: Reply
    principal: Principal
    directive: Directive | None
    request: ChatRequest
    provider: Provider


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatPipeline:
    """Everything a chat request passes through. One instance serves all requests of a worker."""

    authenticator: Authenticator
    rate_limiter: RateLimiter
    directive_book: DirectiveBook
    router: Router
    idempotency: Idempotency
    journal: Journal
    metrics: Metrics
    captures_content: bool = False

    async def serve(self, call: Call, reply: Reply) -> None:
        """Answer one chat request. Raises RequestError for whatever can still be answered with an error."""
        clock = call.clock
        principal = await self.authenticator.authenticate(call.authorization, call.agent_id, call.address)
        check_path_organization(principal, call.path_org)
        clock.finish(Stage.AUTHENTICATION)
        if principal.was_cached:
            call.headers["X-IBEX-Auth-Cached"] = "true"
        admission = await self.rate_limiter.admit(principal)
        clock.finish(Stage.RATE_LIMIT)
        call.headers.update(admission.headers)
        directive = await self.directive_book.in_force(principal)
        clock.finish(Stage.DIRECTIVE)
        body = await call.read_body()
        request = read_chat(body)
        clock.finish(Stage.READ)
        exchange = Exchange(call, reply, principal, directive, request, self.router.choose(request.model))
        if call.idempotency_key is None:
            await self._take_turn(exchange, None)
        else:
            await self._take_turn_once(exchange, call.idempotency_key, body)

    async def _take_turn_once(self, exchange: Exchange, key: str, body: bytes) -> None:
        """Take the turn under an Idempotency-Key, or give the reply of the request that took it before."""
        if not is_idempotency_key(key):
            raise ValidationFailed(
                "`Idempotency-Key` must be 1–256 printable ASCII characters.", param="Idempotency-Key"
            )
        check_session(exchange.call.session_id)  # a replay has the first one's, but what is malformed is never taken
        bearer = read_bearer(exchange.call.authorization)
        digest = sha256(body).digest()
        claim = await self.idempotency.claim(exchange.principal, key, bearer, digest, mint_turn_id())
        if isinstance(claim, StoredReply):
            await self._replay(exchange, claim)
            return
        try:
            await self._take_turn(exchange, claim)
        finally:
            claim.free()

    async def _take_turn(self, exchange: Exchange, claim: Claim | None) -> None:
        """Forward and relay; whatever ends the exchange ends its turn, once."""
        turn_id = mint_turn_id()
        external_id = choose_session(exchange.call.session_id, turn_id)
        self.journal.check_room()
        turn = self._open_turn(exchange, turn_id, external_id)
        exchange.call.headers["X-IBEX-Turn-ID"] = str(turn.facts.turn_id)
        exchange.call.headers["X-IBEX-Session-ID"] = external_id
        reply = exchange.reply
        try:
            answer = await self._forward(exchange, turn)
            try:
                relay = self._relay_stream if exchange.request.is_streaming else self._relay_json
                await relay(exchange, turn, answer, claim)
            except BaseException:  # failed or cancelled: the provider is not to go on for nobody
                answer.abort()
                raise
        except RequestError as error:
            turn.attempts = turn.attempts or error.attempts
            if not reply.has_left:
                raise await _when_kept(turn.close_refused(error), error) from error.__cause__
            await reply.cut(await _when_kept(turn.close_cut(error), error))
        except (asyncio.CancelledError, ConnectionError):
            if reply.interruption is None:
                turn.close_left(after_first_byte=reply.has_left)
                raise
            end = turn.close_cut if reply.has_left else turn.close_refused
            raise await _when_kept(end(reply.interruption), reply.interruption) from None
        except Exception:  # a bug ends the turn too; the middleware answers it
            end = turn.close_cut if reply.has_left else turn.close_refused
            end(InternalError())
            raise

    async def _forward(self, exchange: Exchange, turn: OpenTurn) -> ProviderReply:
        call, request, directive, provider = exchange.call, exchange.request, exchange.directive, exchange.provider
        asks = request.is_streaming and provider.accepts_stream_usage and not request.asks_for_usage
        body = weave(request, directive, ask_usage=asks)
        call.clock.finish(Stage.WEAVE)
        answer = await provider.complete(
            ProviderCall(
                body=body,
                is_streaming=request.is_streaming,
                make_body_without_usage=partial(weave, request, directive, ask_usage=False) if asks else None,
                trace_headers=call.trace_headers,
                redact=(directive.text,) if directive is not None else (),
            )
        )
        turn.attempts = answer.attempts
        turn.provider_ttfb = answer.ttfb
        turn.provider_request_id = answer.provider_request_id
        turn.hides_usage = asks and answer.has_usage_asked
        call.headers.update(answer.headers)
        return answer

    async def _relay_json(self, exchange: Exchange, turn: OpenTurn, answer: ProviderReply, claim: Claim | None) -> None:
        """Give the provider's bytes as they are; the end of them only when the turn is kept."""
        call, reply = exchange.call, exchange.reply
        body = await answer.read()
        call.clock.finish(Stage.PROVIDER)
        turn.note(body)
        if call.trace is not None and call.trace.is_sampled:
            call.trace.reply = read_reply_facts(body)
        reply.begin(200, call.headers, length=len(body))
        held = len(body) - 1 if len(body) > MAX_HELD_BYTES else 0
        if held:
            await reply.write(body[:held])
        committed = turn.close_whole(read_usage(body))
        await _keep(committed, claim, call, turn, [body])
        await reply.finish(body[held:])
        call.clock.finish(Stage.RELAY)

    async def _relay_stream(
        self, exchange: Exchange, turn: OpenTurn, answer: ProviderReply, claim: Claim | None
    ) -> None:
        """Give whole events the moment they are whole; `[DONE]` and the end of the body only when the turn is kept."""
        call, reply = exchange.call, exchange.reply
        call.clock.finish(Stage.PROVIDER)
        call.headers.update(STREAM_HEADERS)
        reply.begin(200, call.headers, length=None)
        await reply.write(b"")
        seen = StreamReader(hides_usage=turn.hides_usage)
        relayed: list[bytes] = []
        """What an Idempotency-Key would replay; beyond what is kept it need not grow."""
        size, last = 0, b""
        async with aclosing(answer.events()) as reads:
            async for events in reads:
                data, last = _sift(events, seen)
                if data:
                    turn.note(data)
                    if claim is not None and size <= MAX_REPLY_BYTES:
                        relayed.append(data)
                        size += len(data)
                    await reply.write(data)
                if seen.error is not None:
                    raise ProviderUnavailable(answer.clean_text(_error_text(seen.error)))
                if seen.is_done:
                    break
        if not seen.is_whole:
            raise ProviderUnavailable("The model provider ended the stream before it was whole.")
        answer.release()
        if call.trace is not None and call.trace.is_sampled:
            call.trace.reply = seen.facts()
        turn.note(last)
        committed = turn.close_whole(seen.usage)
        await _keep(committed, claim, call, turn, [*relayed, last])
        await reply.finish(last)
        call.clock.finish(Stage.RELAY)

    async def _replay(self, exchange: Exchange, stored: StoredReply) -> None:
        """Give a kept reply again: its own turn and session in the headers, a turn of its own in the traces."""
        call, reply = exchange.call, exchange.reply
        turn = self._open_turn(exchange, mint_turn_id(), stored.external_id, replay_of=stored.turn_id)
        call.headers.update(stored.headers)
        call.headers["X-IBEX-Turn-ID"] = str(stored.turn_id)
        call.headers["X-IBEX-Session-ID"] = stored.external_id
        call.headers["X-IBEX-Replayed"] = "true"
        reply.begin(stored.status, call.headers, length=None if stored.is_streaming else len(stored.body))
        await _keep(turn.close_replayed(), None, call, turn, [])
        await reply.finish(stored.body)

    def _open_turn(
        self, exchange: Exchange, turn_id: TurnId, external_id: str, *, replay_of: UUID | None = None
    ) -> OpenTurn:
        principal, request, directive = exchange.principal, exchange.request, exchange.directive
        facts = TurnFacts(
            turn_id=turn_id,
            request_id=exchange.call.request_id,
            org_id=principal.org_id,
            agent_id=principal.agent_id,
            external_id=external_id,
            model=request.model,
            model_label=self.router.label(request.model),
            provider=exchange.provider.name,
            is_streaming=request.is_streaming,
            directive_version=None if directive is None else directive.version,
            messages=request.messages,
            replay_of=replay_of,
        )
        return OpenTurn(
            facts,
            exchange.call.clock,
            self.journal,
            self.metrics,
            captures_content=self.captures_content,
            trace=exchange.call.trace,
        )


async def _keep(
    committed: asyncio.Future[None] | None, claim: Claim | None, call: Call, turn: OpenTurn, body: list[bytes]
) -> None:
    """Wait until the turn is in the journal and, under an Idempotency-Key, its reply in Redis.

    A client that hangs up meanwhile stops neither. Raises ServiceDegraded when the journal could not take the turn.
    """
    if committed is None:
        return
    if claim is not None:
        is_committed = await asyncio.shield(claim.store_after(committed, _to_stored_reply(call, turn, body)))
    else:
        try:
            await committed  # the future alone may be cancelled with the request: the record is under way
        except StoreUnavailable:
            is_committed = False
        else:
            is_committed = True
    if not is_committed:
        raise ServiceDegraded("The turn could not be recorded, so its reply is withheld.")


async def _when_kept(committed: asyncio.Future[None] | None, error: RequestError) -> RequestError:
    """What the client is told of a turn that failed, once the turn is in the journal."""
    try:
        if committed is not None:
            await committed
    except StoreUnavailable:
        return ServiceDegraded("The turn could not be recorded, and it had failed.")
    return error


def _to_stored_reply(call: Call, turn: OpenTurn, body: list[bytes]) -> StoredReply:
    return StoredReply(
        status=200,
        headers=tuple((name, call.headers[name]) for name in REPLAYED_HEADERS if name in call.headers),
        body=b"".join(body),
        is_streaming=turn.facts.is_streaming,
        turn_id=turn.facts.turn_id,
        external_id=turn.facts.external_id,
    )


def _sift(events: list[bytes], seen: StreamReader) -> tuple[bytes, bytes]:
    """What of these events goes to the client now, and the `[DONE]` that is held back."""
    relayed = []
    for event in events:
        fate = seen.take(event_data(event))
        if fate is Fate.RELAY:
            relayed.append(event)
        elif fate is Fate.DONE:
            return b"".join(relayed), event
        elif fate is Fate.FAIL:
            break
    return relayed[0] if len(relayed) == 1 else b"".join(relayed), b""


def _error_text(error: Any) -> str:
    """The message of a provider's error object, whatever its shape."""
    message = error.get("message") if isinstance(error, dict) else error
    return message if isinstance(message, str) and message else "The model provider broke off the stream with an error."
