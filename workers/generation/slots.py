"""Which slot of the KV cache belongs to which sequence.

The cache is a table of slots; a slot has room for the keys and values of one sequence, prompt and new tokens. A sequence
has its slot from start to end, so there is no preemption and no deadlock. When it ends, the slot keeps what is in it until
somebody needs the room: a chat's next turn sends its whole history again, and starts where that ends.
"""

from collections import OrderedDict
from contextvars import ContextVar
from heapq import heapify, heappop, heappush
from typing import NamedTuple

# On whose behalf this code runs: a digest of the API key, empty where none is needed.
OWNER: ContextVar[str] = ContextVar("owner", default="")


class Kept(NamedTuple):
    """What a slot still holds of a sequence that has ended."""

    owner: str  # whose it is: nobody else may find out that it is there
    ids: list[int]


class Slots:
    """The slots that no sequence has: empty ones and those that keep something, the longest unused first."""

    def __init__(self, n: int) -> None:
        self.empty = list(range(n))  # a heap: low slots first, so that those in use are neighbours
        self.kept: OrderedDict[int, Kept] = OrderedDict()

    def __len__(self) -> int:
        """Return how many sequences can start."""
        return len(self.empty) + len(self.kept)

    def take(self, prompt: list[int], owner: str) -> tuple[int, int]:
        """Return a slot for this prompt, and how many of its tokens are in there already. There must be one.

        The last token is never among them: the next one is chosen by what the model computes for it.
        """
        best, slot = 0, -1
        for candidate, kept in self.kept.items():
            if kept.owner != owner:
                continue
            same = shared(kept.ids, prompt)
            # What begins alike but goes on differently is another conversation: leave it to that.
            if same > best and 2 * same > len(kept.ids):
                best, slot = same, candidate
        if slot >= 0:
            del self.kept[slot]
        elif self.empty:
            slot = heappop(self.empty)
        else:
            slot, _ = self.kept.popitem(last=False)
        return slot, min(best, len(prompt) - 1)

    def give_back(self, slot: int, owner: str, ids: list[int]) -> None:
        """Free a slot that holds the keys and values of `ids`."""
        if ids:
            self.kept[slot] = Kept(owner, ids)
        else:
            heappush(self.empty, slot)

    def drop(self, slot: int) -> None:
        """Note that what this slot kept, if it did, is lost."""
        if self.kept.pop(slot, None):
            heappush(self.empty, slot)

    def forget(self) -> None:
        """Note that what the slots kept is lost."""
        self.empty += self.kept
        self.kept.clear()
        heapify(self.empty)


def shared(a: list[int], b: list[int]) -> int:
    """Return how many tokens two sequences have in common from the start on."""
    low, high = 0, min(len(a), len(b))
    if a[:8] != b[:8] and high >= 8:
        return 0  # too little to matter, and the usual case
    while low < high:  # a[:low] is alike; slices compare at the speed of C
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low
