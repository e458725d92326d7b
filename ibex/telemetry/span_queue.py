"""Spans on their way to the collector: a bounded queue and one thread, so that no request ever waits for either."""

import asyncio
import contextlib
import logging
import threading
from collections import deque
from collections.abc import Sequence

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from ibex.telemetry.exporters import listen_to_exporters
from ibex.telemetry.metrics import Metrics

log = logging.getLogger("ibex.tracing")

MAX_WAITING = 4096
"""Spans that wait for the collector; what comes beyond is dropped, and counted."""
BATCH = 128
"""Spans of one export: encoding holds the interpreter, so that a batch is a pause of the event loop's too."""
GATHER_SECONDS = 0.5
"""How long the first span of a batch waits for company."""
CLOSE_SECONDS = 2.0
"""How long the end of a process waits for the collector."""


class SpanQueue:
    """Takes spans from the event loop and gives them to an exporter in a thread of its own.

    A collector that is away, slow or silent costs spans, never time: they are counted in `ibex_otel_spans_total`, and
    the log says once that they are lost and once that they arrive again.
    """

    def __init__(self, exporter: SpanExporter, metrics: Metrics) -> None:
        self._exporter = exporter
        self._waiting: deque[ReadableSpan] = deque()
        self._exported, self._failed, self._dropped = (
            metrics.otel_spans_total.labels(result) for result in ("exported", "failed", "dropped")
        )
        self._first_words = listen_to_exporters()
        self._is_losing = False
        self._is_over = False
        """From then on the thread, should it still wait for the collector, counts and says nothing more."""
        self._has_some = threading.Event()
        self._is_closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="span exporter", daemon=True)
        self._thread.start()

    def offer(self, spans: Sequence[ReadableSpan]) -> None:
        """Queue the spans of one request, all or none of them."""
        if len(self._waiting) + len(spans) > MAX_WAITING:
            self._dropped.inc(len(spans))
            self._note_loss("the collector is too slow")
            return
        self._waiting.extend(spans)
        self._has_some.set()

    async def close(self) -> None:
        """Export what waits, for at most two seconds; what then is left is dropped, and the thread left to its fate."""
        self._is_closing.set()
        self._has_some.set()
        await asyncio.to_thread(self._thread.join, CLOSE_SECONDS)
        self._is_over = True
        left = len(self._waiting)
        self._waiting.clear()
        if left:
            self._dropped.inc(left)
            log.warning("spans were left behind", extra={"spans": left})
        self._exporter.shutdown()

    def _run(self) -> None:
        while not self._is_closing.is_set():
            self._has_some.wait()
            self._has_some.clear()
            self._is_closing.wait(GATHER_SECONDS)
            while batch := self._take_batch():
                self._export(batch)

    def _take_batch(self) -> list[ReadableSpan]:
        batch: list[ReadableSpan] = []
        with contextlib.suppress(IndexError):  # empty, perhaps since a moment ago: `close` gives up what is left
            while len(batch) < BATCH:
                batch.append(self._waiting.popleft())
        return batch

    def _export(self, batch: list[ReadableSpan]) -> None:
        self._first_words.listen()
        try:
            is_exported = self._exporter.export(batch) is SpanExportResult.SUCCESS
            reason = self._first_words.text
        except Exception as error:  # noqa: BLE001 - whatever a library raises must not end the thread
            is_exported, reason = False, type(error).__name__
        if self._is_over:
            return
        if is_exported:
            self._exported.inc(len(batch))
            self._note_arrival()
        else:
            self._failed.inc(len(batch))
            self._note_loss(reason)

    def _note_loss(self, reason: str) -> None:
        if not self._is_losing:
            self._is_losing = True
            log.warning("spans are lost", extra={"reason": reason})

    def _note_arrival(self) -> None:
        """One batch that arrives while the queue is still full is no recovery: it would be said at each batch."""
        if self._is_losing and len(self._waiting) < MAX_WAITING // 2:
            self._is_losing = False
            log.info("spans reach the collector again")
