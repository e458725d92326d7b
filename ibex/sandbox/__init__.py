"""The sandbox: an OpenAI-compatible upstream on a real socket, for development, tests and benchmarks.

It answers by rule, no model: `Reply with exactly: X` in the last user message is obeyed, anything else gets a short
text that says where it comes from. Every answer carries `"system_fingerprint": "ibex-sandbox"` and the header
`x-ibex-sandbox: true`.

    POST /v1/chat/completions      JSON and streams, n choices, forced tool calls, plausible usage
    GET  /v1/models, /v1/models/X  what it calls itself; a model named `no-such-model…` is unknown everywhere
    GET  /_sandbox/requests        the last requests: headers (Authorization masked), the body's text, how each ended
    DELETE /_sandbox/requests      forget them

A request can ask for trouble: a JSON object in its own field `metadata.sandbox` (which passes through a proxy; as text
too, since OpenAI's metadata holds only strings), or in the header `X-Sandbox`. Its members are the fields of
`ibex.sandbox.requests.Controls`: `{"status": 503, "times": 2}` fails twice, `{"cut_after": 3}` breaks the connection
after three events, `{"delay_ms": 200}` waits first, `{"hang_after": 1}` falls silent. `{"raw": "SFRUUC8yIG9kZA=="}`
writes these bytes (in base64) in place of an answer, head included, and closes: wrong framing, two lengths, a head that
is none. With `"raw_end"` it ends otherwise: `keep` takes further requests on the connection, so that bytes beyond an
answer's end can be sent to whoever asks next; `hang`, `reset` and `half_close` are what they say.
"""

from ibex.sandbox.requests import ChatRequest, Controls
from ibex.sandbox.server import Sandbox

__all__ = ["ChatRequest", "Controls", "Sandbox"]
