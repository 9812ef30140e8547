"""One expert's process, started again whenever it ends, with growing pauses."""

from __future__ import annotations

import asyncio
import contextlib
import time
from asyncio.subprocess import Process
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from token_swarm_server.expert_server.process import STOP_SECONDS


@dataclass(frozen=True)
class RestartPolicy:
    """When a process that ended is started again.

    After the n-th death within `window` seconds: `pause` · 2^(n-1) seconds later. From `deaths` of them on the breaker
    is open: it is tried once every `open_seconds`, which must be less than `window`, until it lives.
    """

    pause: float = 0.5
    deaths: int = 5
    window: float = 120.0
    open_seconds: float = 60.0

    def delay(self, deaths: int) -> float:
        """Seconds to wait after so many deaths within the window."""
        if deaths >= self.deaths:
            return self.open_seconds
        return float(self.pause * 2 ** (deaths - 1))


class ExpertProcess:
    """Keeps a process running from `start` to `stop`."""

    def __init__(
        self,
        name: str,
        log: Path,
        spawn: Callable[[], Awaitable[Process]],
        policy: RestartPolicy,
        report: Callable[[str], None],
    ) -> None:
        """`spawn` starts the process; what happens to it is told to `report`, in one line each."""
        self.name = name
        self.log = log
        self.restarts = 0
        self.trouble: str | None = None
        """Why the process does not run; None while it does."""
        self._spawn = spawn
        self._policy = policy
        self._report = report
        self._deaths: deque[float] = deque()
        self._blame: str | None = None
        self._process: Process | None = None
        self._watcher: asyncio.Task[None] | None = None

    @property
    def process(self) -> Process:
        """The process as it runs now, or ran last. Raises RuntimeError before `start`."""
        if self._process is None:
            raise RuntimeError("the process was not started")
        return self._process

    async def start(self) -> None:
        """Start the process. Raises what `spawn` does."""
        self._process = await self._spawn()

    def watch(self) -> None:
        """From now on start it again whenever it ends."""
        self._watcher = asyncio.create_task(self._keep())

    def kill(self, reason: str) -> None:
        """End the process, which hangs or answers nonsense; `watch` starts it again."""
        if self.process.returncode is None:
            self._blame = reason
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()

    async def stop(self) -> None:
        """SIGTERM and, after `STOP_SECONDS`, SIGKILL; it is not started again."""
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
        if self._process is None or self._process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        try:
            await asyncio.wait_for(self._process.wait(), STOP_SECONDS)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()

    async def _keep(self) -> None:
        while True:
            code = await self.process.wait()
            now = time.monotonic()
            self._deaths.append(now)
            while self._deaths[0] < now - self._policy.window:
                self._deaths.popleft()
            delay = self._policy.delay(len(self._deaths))
            how = f"was ended by signal {-code}" if code < 0 else f"exited with code {code}"
            self.trouble = f"its process {how}" + (f" ({self._blame})" if self._blame else "")
            if len(self._deaths) >= self._policy.deaths:
                self.trouble += f", {len(self._deaths)} times of late; the next start is in {delay:g} s"
            self._blame = None
            self._report(f"expert {self.name}: {self.trouble}; see {self.log}; it is started again in {delay:g} s")
            await asyncio.sleep(delay)
            try:
                self._process = await self._spawn()
            except Exception as error:
                # Such as an interpreter that was removed meanwhile: counted as a death, tried again.
                self._report(f"expert {self.name} cannot be started: {error}")
                continue
            self.restarts += 1
            self.trouble = None
