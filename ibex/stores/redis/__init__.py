"""Redis: rate limits, idempotency keys and news of changes, over connections read by hiredis."""
