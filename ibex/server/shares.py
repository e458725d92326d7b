"""What workers told each other, kept for those that start later: bounded, newest last, in memory only."""

from collections import OrderedDict
from collections.abc import Iterator

from ibex.server.messages import Share

MAX_ENTRIES = 5000
MAX_BYTES = 4 << 20


class ShareBook:
    """The latest payload of each key; the oldest leave when there are too many or they weigh too much."""

    def __init__(self, max_entries: int = MAX_ENTRIES, max_bytes: int = MAX_BYTES) -> None:
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._shares: OrderedDict[bytes, Share] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._shares)

    def __iter__(self) -> Iterator[Share]:
        """Oldest first, as they were said."""
        return iter(self._shares.values())

    def keep(self, share: Share) -> None:
        """Keep a payload instead of its key's former one."""
        former = self._shares.pop(share.key, None)
        if former is not None:
            self._bytes -= _weight(former)
        self._shares[share.key] = share
        self._bytes += _weight(share)
        while len(self._shares) > self._max_entries or self._bytes > self._max_bytes:
            _, oldest = self._shares.popitem(last=False)
            self._bytes -= _weight(oldest)


def _weight(share: Share) -> int:
    return len(share.key) + len(share.payload)
