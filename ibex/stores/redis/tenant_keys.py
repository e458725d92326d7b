"""What Redis holds of one organization: rate windows and kept replies. Every such key carries its id in braces."""

import redis
import redis.asyncio

from ibex.domain.identity import OrgId
from ibex.errors import StoreUnavailable

_SECONDS = 10.0
_BATCH = 1000


async def delete_tenant_keys(url: str, org_id: OrgId) -> int:
    """Delete every key of an organization; how many there were. Raises StoreUnavailable."""
    deleted = 0
    try:
        async with redis.asyncio.from_url(url, socket_timeout=_SECONDS, socket_connect_timeout=_SECONDS) as client:
            found: list[bytes] = []
            async for key in client.scan_iter(match=f"ibex:*{{{org_id}}}*", count=_BATCH):
                found.append(key)
                if len(found) == _BATCH:
                    deleted += await client.unlink(*found)
                    found.clear()
            if found:
                deleted += await client.unlink(*found)
    except (redis.RedisError, OSError, TimeoutError) as error:
        raise StoreUnavailable("Redis is away.") from error
    return deleted
