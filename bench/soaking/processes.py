"""The processes below a server as the operating system sees them: who lives, and what each holds."""

from __future__ import annotations

import asyncio
import contextlib
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

SHARED_MEMORY = Path("/dev/shm")
SEGMENTS = "token-swarm-" + 32 * "[0-9a-f]"


@dataclass
class Life:
    """One process. Times in seconds of `time.monotonic`; memory in bytes.

    since: when it first took work, so that it has loaded its model; None before.
    """

    name: str
    process: psutil.Process
    since: float | None = None
    memory: list[tuple[float, int, int]] = field(default_factory=list)
    """When, resident memory, and the part of it that belongs to no file."""
    descriptors: list[int] = field(default_factory=list)

    def look(self, now: float) -> None:
        """Add a sample, once it has taken work. Raises psutil.Error when the process is gone."""
        if self.since is None:
            return
        with self.process.oneshot():
            found = self.process.memory_info()
            self.memory.append((now, found.rss, found.rss - found.shared))
            self.descriptors.append(self.process.num_fds())

    def memory_growth(self, warm: float) -> float | None:
        """Share by which the memory grew after `warm` seconds of life; None if it lived less than twice as long.

        What belongs to no file, since pages of libraries come and go as the machine needs memory, over everything
        resident before. Medians of the first and of the last tenth of the samples.
        """
        if self.since is None or not self.memory or self.memory[-1][0] < self.since + 2 * warm:
            return None
        later = [(all_of_it, own) for at, all_of_it, own in self.memory if at >= self.since + warm]
        tenth = max(1, len(later) // 10)
        grown = statistics.median(own for _, own in later[-tenth:]) - statistics.median(own for _, own in later[:tenth])
        return grown / statistics.median(all_of_it for all_of_it, _ in later[:tenth])


class Processes:
    """The server and its experts. Looked at by `watch`; experts that come and go are told apart by their start."""

    def __init__(self, server: int) -> None:
        """`server`: id of the process of `token-swarm serve`."""
        self.server = Life("coordinator", psutil.Process(server), time.monotonic())
        self.lives: dict[tuple[int, float], Life] = {}
        self.segments_before = segments()

    def experts(self) -> list[Life]:
        """The experts that live now."""
        found = []
        for child in self.server.process.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                words = child.cmdline()
                if "expert" in words and child.status() != psutil.STATUS_ZOMBIE:
                    key = (child.pid, child.create_time())
                    name = words[words.index("expert") + 1]
                    found.append(self.lives.setdefault(key, Life(name, child)))
        return found

    def takes_work(self, name: str) -> None:
        """The expert called `name` answers: from now on its process is looked at."""
        for life in self.experts():
            if life.name == name and life.since is None:
                life.since = time.monotonic()

    def kill_one(self, dice: random.Random) -> str | None:
        """SIGKILL for one expert; its name, or None if none lives."""
        if not (alive := self.experts()):
            return None
        chosen = dice.choice(sorted(alive, key=lambda life: life.name))
        with contextlib.suppress(psutil.NoSuchProcess):
            chosen.process.kill()
        return chosen.name

    def look(self) -> None:
        """Add a sample of everybody."""
        now = time.monotonic()
        for life in (self.server, *self.experts()):
            with contextlib.suppress(psutil.Error):
                life.look(now)

    async def watch(self, seconds: float) -> None:
        """Look every so many seconds, until cancelled."""
        while True:
            self.look()
            await asyncio.sleep(seconds)

    def mapped_segments(self) -> int:
        """Segments of shared memory that the coordinator maps: one for each expert that it is connected to."""
        maps = {each.path for each in self.server.process.memory_maps() if "/token-swarm-" in each.path}
        return len(maps)

    def segments_left(self) -> set[str]:
        """Names in shared memory that were not there at the start: each connection takes its name away at once."""
        return segments() - self.segments_before

    def growth(self, warm: float) -> Mapping[str, list[float]]:
        """`Life.memory_growth` of every process that lived long enough, by name."""
        grown: dict[str, list[float]] = {}
        for life in (self.server, *self.lives.values()):
            if (share := life.memory_growth(warm)) is not None:
                grown.setdefault(life.name, []).append(share)
        return grown


def segments() -> set[str]:
    """Names of segments in shared memory, those of other servers of this machine included."""
    return {path.name for path in SHARED_MEMORY.glob(SEGMENTS)}


async def eventually(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether `condition` comes true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        await asyncio.sleep(0.1)
    return True
