#!/usr/bin/env bash
# One real completion through a running proxy, whole and as a stream, and the record both must leave.
#
#   OPENAI_API_KEY      required: the smoke test is for a proxy that can reach its provider
#   IBEX_PROXY_ADDR     where the proxy listens                    (http://localhost:8080)
#   IBEX_DEV_TOKEN      the bearer token to present                (the development token)
#   IBEX_DEV_AGENT_ID   the agent to act as                        (00000000-0000-0000-0000-000000000003)
#   IBEXCTL             the ibexctl that can reach the stores      (.venv/bin/ibexctl, else the one on PATH)
#
# Needs bash, curl and python3. Exits 0 when everything passed, else 1 with what to do.
set -euo pipefail

proxy=${IBEX_PROXY_ADDR:-http://localhost:8080}
proxy=${proxy%/}
token=${IBEX_DEV_TOKEN:-ibex_dev_sk_LOCALDEVELOPMENTONLY}
agent=${IBEX_DEV_AGENT_ID:-00000000-0000-0000-0000-000000000003}
expected="IBEX_OK"
record_seconds=30

fail() { # what happened, what to do
  printf 'FAIL: %s\n' "$1" >&2
  printf '      %s\n' "$2" >&2
  exit 1
}

if [[ -z ${OPENAI_API_KEY:-} ]]; then
  echo "OPENAI_API_KEY is required for Phase 2 e2e smoke" >&2
  exit 1
fi
for program in curl python3; do
  command -v "$program" >/dev/null || fail "$program is not installed." "Install $program and run this again."
done
if [[ $token == *[[:cntrl:]\"\\]* ]]; then
  fail "IBEX_DEV_TOKEN holds a character that no token has." "Set it to a token as \`ibexctl token mint\` printed it."
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
session="smoke-$(python3 -c 'import secrets; print(secrets.token_hex(8))')"

# post STREAM NAME: asks for the completion; leaves NAME.status, NAME.head and NAME.body. The token goes to curl through
# a pipe: arguments are for everybody on this machine to read.
post() {
  local is_stream=$1 name=$2 body code=0
  body='{"model": "gpt-4o-mini", "stream": '$is_stream', "temperature": 0, "messages": [{"role": "user", "content": "Reply with exactly: '$expected'"}]}'
  printf 'header = "Authorization: Bearer %s"\n' "$token" |
    curl --config - --silent --show-error --max-time 180 \
      --header "X-IBEX-Agent-ID: $agent" --header "X-IBEX-Session-ID: $session" --header "Content-Type: application/json" \
      --data-binary "$body" --dump-header "$work/$name.head" --output "$work/$name.body" --write-out '%{http_code}' \
      "$proxy/v1/chat/completions" >"$work/$name.status" 2>"$work/$name.problem" || code=$?
  if [[ $code -ne 0 && ! -s $work/$name.head ]]; then
    fail "Nothing answers at $proxy ($(head -n 1 "$work/$name.problem"))." \
      "Start the proxy with \`make run\`, or set IBEX_PROXY_ADDR to where it listens."
  elif [[ $code -ne 0 ]]; then
    fail "The reply broke off ($(head -n 1 "$work/$name.problem"))." "The proxy's log says why."
  fi
  [[ $(<"$work/$name.status") == 200 ]] || fail_by_status "$name"
}

fail_by_status() { # a refusal: its code, message and request id from the envelope, and what mends it
  local explained
  explained=$(python3 - "$(<"$work/$1.status")" "$work/$1.body" <<'PY'
import json, sys

status, path = sys.argv[1:]
try:
    error = json.load(open(path, encoding="utf-8"))["error"]
    print(f"The proxy answered {status} {error['code']}: {error['message']} (request {error['request_id']})")
    code = error["code"]
except (ValueError, KeyError, TypeError, OSError):
    print(f"The proxy answered {status}, and not in ibex's words: something else may listen there.")
    code = ""
print({
    "INVALID_TOKEN": "Set IBEX_DEV_TOKEN to a valid token: `ibexctl token mint --org ORG`.",
    "AGENT_NOT_AUTHORIZED": "Set IBEX_DEV_AGENT_ID to an agent of the token's organization: `ibexctl agent register`.",
    "AGENT_SUSPENDED": "The agent is not active.",
    "ORG_SUSPENDED": "The organization is not active.",
    "INSUFFICIENT_PERMISSIONS": "Mint a token with the permission set ProxyChatCompletion.",
    "RATE_LIMITED": "Wait a minute, or raise the limit: `ibexctl org limit ORG --rpm N`.",
    "PROVIDER_NOT_CONFIGURED": "Start the proxy with OPENAI_API_KEY set, and gpt-4o-mini within IBEX_OPENAI_MODELS.",
    "PROVIDER_UNAVAILABLE": "Check the proxy's OPENAI_API_KEY and OPENAI_BASE_URL, and that it may reach the provider.",
    "PROVIDER_TIMEOUT": "The provider did not answer in time: try again.",
    "SERVICE_DEGRADED": f"A store is away: ask the proxy's /ready which.",
}.get(code, "The proxy's log says more; the request id finds the line."))
PY
  )
  fail "${explained%%$'\n'*}" "${explained#*$'\n'}"
}

# upstream HEAD FINGERPRINT-FILE: who answered, by what only that upstream says.
name_upstream() {
  if [[ $(<"$work/fingerprint") == ibex-sandbox* ]]; then
    echo "the ibex sandbox"
  elif grep -qi '^openai-processing-ms:' "$work/whole.head"; then
    echo "OpenAI"
  else
    echo "an OpenAI-compatible upstream"
  fi
}

echo "=== Phase 2 E2E Smoke Test ==="
echo "Proxy:   $proxy"
echo "Session: $session"

post false whole
echo "Provider response received."

problem=$(python3 - "$work/whole.body" "$expected" "$work/fingerprint" <<'PY'
import json, sys

path, expected, fingerprint = sys.argv[1:]
try:
    reply = json.load(open(path, encoding="utf-8"))
except ValueError:
    sys.exit(print("The reply is not JSON."))
choices = reply.get("choices") if isinstance(reply, dict) else None
if not isinstance(choices, list) or not choices:
    sys.exit(print("The reply has no `choices`."))
try:
    content = choices[0]["message"]["content"]
except (KeyError, TypeError):
    sys.exit(print("The reply's first choice has no message content."))
if not isinstance(content, str) or content.strip().strip("\"'`.") != expected:
    sys.exit(print(f"The content is not {expected} but {str(content)[:80]!r}."))
with open(fingerprint, "w", encoding="utf-8") as file:
    file.write(str(reply.get("system_fingerprint") or ""))
PY
)
[[ -z $problem ]] || fail "$problem" "Try again; if it stays so, look at OPENAI_BASE_URL and the agent's directive."

upstream=$(name_upstream)
if [[ $upstream == OpenAI ]]; then
  echo "PASS: real OpenAI completion received and validated"
else
  echo "PASS: completion of $upstream (a stand-in, not OpenAI) received and validated"
fi

post true stream
problem=$(python3 - "$work/stream.body" "$expected" <<'PY'
import json, sys

path, expected = sys.argv[1:]
items = [line[5:].strip() for line in open(path, encoding="utf-8") if line.startswith("data:")]
if not items:
    sys.exit(print("The stream has no events."))
if items[-1] != "[DONE]":
    sys.exit(print("The stream does not end with [DONE]."))
text = ""
for item in items[:-1]:
    try:
        event = json.loads(item)
    except ValueError:
        sys.exit(print("An event of the stream is not JSON."))
    if "error" in event:
        sys.exit(print(f"The stream failed: {event['error'].get('message')}"))
    for choice in event.get("choices", []):
        text += choice.get("delta", {}).get("content") or ""
if text.strip().strip("\"'`.") != expected:
    sys.exit(print(f"The stream's content is not {expected} but {text[:80]!r}."))
PY
)
[[ -z $problem ]] || fail "$problem" "Try again; if it stays so, the proxy's log says what the provider sent."
echo "PASS: the same as a stream, whole to its [DONE]"

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
ibexctl=${IBEXCTL:-}
[[ -n $ibexctl || ! -x $here/.venv/bin/ibexctl ]] || ibexctl=$here/.venv/bin/ibexctl
[[ -n $ibexctl ]] || ibexctl=$(command -v ibexctl || true)

# Embedded stores are within reach while their server runs on this data directory; others by their address. Asking
# `status` first matters: other commands would start engines of their own, which know nothing of this session.
has_store_access() {
  [[ -n $ibexctl ]] || return 1
  if ! "$ibexctl" status --json >/dev/null 2>&1; then
    case ${IBEX_POSTGRES_DSN:-${POSTGRES_DSN:-embedded}} in embedded) return 1 ;; esac
  fi
  "$ibexctl" trace list --session "$session" --agent "$agent" --json >"$work/traces.json" 2>/dev/null
}

# records_problem: empty when both turns have their checkpoint and their trace, else what is missing.
records_problem() {
  "$ibexctl" session show "$session" --agent "$agent" --json >"$work/session.json" 2>/dev/null || true
  "$ibexctl" trace list --session "$session" --agent "$agent" --json >"$work/traces.json" 2>/dev/null || true
  python3 - "$work/session.json" "$work/traces.json" <<'PY'
import json, sys


def rows(path, key):
    try:
        return json.load(open(path, encoding="utf-8")).get(key) or []
    except ValueError:
        return []


checkpoints, traces = rows(sys.argv[1], "checkpoints"), rows(sys.argv[2], "traces")
if [checkpoint["turn_index"] for checkpoint in checkpoints] != [0, 1]:
    print(f"The session has {len(checkpoints)} checkpoints, not turns 0 and 1.")
elif not all(checkpoint["is_complete"] for checkpoint in checkpoints):
    print("A checkpoint is marked incomplete though its reply was whole.")
elif {trace["turn_id"] for trace in traces} != {checkpoint["turn_id"] for checkpoint in checkpoints}:
    print(f"The session has {len(traces)} traces that do not match its 2 checkpoints.")
elif any(trace["outcome"] != "ok" for trace in traces):
    print("A trace's outcome is not ok.")
PY
}

if has_store_access; then
  deadline=$((SECONDS + record_seconds))
  while problem=$(records_problem) && [[ -n $problem ]]; do
    ((SECONDS < deadline)) || fail "$problem" "See \`ibexctl status\` and the recorder's log lines: a store may be away."
    sleep 0.2
  done
  echo "PASS: 2 checkpoints in the session, 2 traces, all whole"
else
  echo "Checkpoints and traces: SKIPPED (no store access)"
fi

echo "=== Phase 2 E2E Smoke: PASSED ==="
