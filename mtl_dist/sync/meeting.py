"""Where ranks meet before they have a group: they leave texts for each other in the job's store.

A collective that some ranks do not attend hangs. Here nothing does: every wait has an end, and says who is
missing. The first rank of the group reads all texts and publishes the list, so a meeting of W ranks costs
O(W). Rounds belong to a set of ranks, and the next round is the first that is not published in the store. So
it does not matter in how many other groups a rank is a member, or in how many other meetings it was.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

_OUTSIDERS_SECONDS = 2.0  # how long a part of the job looks whether the others mean the same balancer


class Store(Protocol):
    """What is used of `torch.distributed.Store`."""

    def set(self, key: str, value: str, /) -> None:
        """Writes."""

    def get(self, key: str, /) -> bytes:
        """Reads; waits where there is nothing yet."""

    def check(self, keys: list[str], /) -> bool:
        """Whether all of them were written."""


class Board:
    """The texts of one set of ranks.

    Args:
        store: of the job.
        ranks: of the set, in the order of its group.
        me: this rank's place among them.

    Attributes:
        name: of the last round; no other round of any set has it.
    """

    def __init__(self, store: Store, ranks: Sequence[int], me: int) -> None:
        self._store = store
        self._number = len(ranks)
        self._me = me
        self._set = f"mtl_dist/{_short('_'.join(map(str, ranks)))}"
        self._round = 0

    @property
    def name(self) -> str:
        """The key of the last round."""
        return f"{self._set}/{self._round}"

    def exchange(
        self, text: str, seconds: float, clash: Callable[[list[int]], str | None] = lambda absent: None
    ) -> list[str | None]:
        """The texts of all ranks, in the order of the group; None for ranks that did not come.

        Args:
            text: of this rank, not empty.
            seconds: how long to wait for the others.
            clash: looks whether ranks (places in the group) that are still absent went elsewhere, in words.

        Raises:
            ValueError: with what `clash` said, on every rank.
        """
        while self._store.check([f"{self.name}/all"]):  # also rounds that ended without this rank
            self._round += 1
        mine = f"{self.name}/{self._me}"
        self._store.set(mine, text)
        if self._me == 0:
            published = self._collect(seconds, clash)
            self._store.set(f"{self.name}/all", published)
        elif _until(lambda: self._store.check([f"{self.name}/all"]) or clash([0]), seconds + 1):
            if not self._store.check([f"{self.name}/all"]):
                raise ValueError(clash([0]))
            published = self._store.get(f"{self.name}/all").decode()
        else:
            self._store.set(mine, "")  # the first rank, if it comes later, must not count on this one
            return [text if place == self._me else None for place in range(self._number)]
        return self._read(published)

    def _collect(self, seconds: float, clash: Callable[[list[int]], str | None]) -> str:
        absent = list(range(self._number))
        texts: list[str | None] = [None] * self._number
        said: str | None = None

        def look() -> bool:
            nonlocal said
            for place in list(absent):
                key = f"{self.name}/{place}"
                if self._store.check([key]) and (text := self._store.get(key).decode()):
                    texts[place] = text
                    absent.remove(place)
            said = clash(absent)
            return not absent or said is not None

        _until(look, seconds)
        if said is not None:
            return json.dumps({"clash": said})
        return json.dumps({"same": texts[0]} if len(set(texts)) == 1 else {"texts": texts})

    def _read(self, published: str) -> list[str | None]:
        content = json.loads(published)
        if "clash" in content:
            raise ValueError(content["clash"])
        texts: list[str | None] = content.get("texts") or [content["same"]] * self._number
        return texts


class Arrival:
    """Tells the whole job with whom this rank meets, and finds ranks that meant the same and say otherwise.

    Rank 0 with `group=None` waits for all ranks; rank 1 with a group of its own would train alone. The two
    are taken for the same balancer where their settings are equal and it is the first one that each process
    calls. (Some ranks only may have called later ones; there the wait for an absent rank has its end.)

    Args:
        store: of the job.
        ranks: the group.
        rank: this rank, in the job.
        settings: of the balancer.
    """

    def __init__(self, store: Store, ranks: Sequence[int], rank: int, settings: str) -> None:
        self._store, self._ranks, self._rank = store, list(ranks), rank
        self._settings = _digest(settings)
        self._number = 0
        while store.check([self._key(rank)]):
            self._number += 1
        store.set(self._key(rank), json.dumps([self._ranks, self._settings]))

    def clash(self, others: Iterable[int]) -> str | None:
        """A sentence, if one of these ranks of the job meets another set of ranks that shares some."""
        for other in others if self._number == 0 else ():
            if other == self._rank or not self._store.check([self._key(other)]):
                continue
            theirs, settings = json.loads(self._store.get(self._key(other)))
            overlap = set(theirs) & set(self._ranks)
            if settings == self._settings and overlap and theirs != self._ranks:
                return (
                    "mtl_dist: ranks were given different groups; give the same group= on all its ranks: "
                    f"rank {self._rank} sums over ranks {self._ranks}, rank {other} over ranks {theirs}. If "
                    "these are different balancers, begin with the one that all ranks call"
                )
        return None

    def whereabouts(self, rank: int) -> str:
        """With whom another rank of the job has met last, in words."""
        number = 0
        while self._store.check([self._key(rank, number)]):
            number += 1
        if not number:
            return f"rank {rank}, which has called no balancer"
        theirs, _ = json.loads(self._store.get(self._key(rank, number - 1)))
        return f"rank {rank}, whose last balancer sums over ranks {theirs}"

    def clash_outside(self, world_size: int) -> str | None:
        """The same for the ranks outside the group, for a short while: they need not come at all."""
        if self._number:
            return None
        outside = sorted(set(range(world_size)) - set(self._ranks))
        keys = [self._key(rank) for rank in outside]
        _until(lambda: self._store.check(keys) or self.clash(outside), _OUTSIDERS_SECONDS)
        return self.clash(outside)

    def _key(self, rank: int, number: int | None = None) -> str:
        return f"mtl_dist/arrival/{rank}/{self._number if number is None else number}"


def _until(holds: Callable[[], object], seconds: float) -> bool:
    """Waits until `holds`, or for so long; whether it holds."""
    end, pause = time.monotonic() + seconds, 0.001
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(pause)
        pause = min(2 * pause, 0.1)
    return True


def _short(ranks: str) -> str:
    return ranks if len(ranks) <= 40 else _digest(ranks)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]
