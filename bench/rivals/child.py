"""A rival's process: one JSON command a line in, one JSON answer a line out.

Used on both sides. It imports nothing of the project, so that a rival can run in another virtual environment.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Handler = Callable[[Mapping[str, Any]], Mapping[str, Any]]


class ChildError(RuntimeError):
    """A rival that ended, or that answered with an error. The message is one line."""


class Child:
    """The parent's end. A child waits on its input between commands and takes no processor time."""

    def __init__(self, name: str, command: Sequence[str], *, threads: int) -> None:
        """threads: what OpenMP gets in the child."""
        self.name = name
        # Threads that spin while they wait would take the cores from whoever else runs.
        quiet = {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
        environment = {**os.environ, **quiet, "OMP_NUM_THREADS": str(threads)}
        self._process = subprocess.Popen(
            list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def send(self, **command: Any) -> None:
        """Hand over a command; `receive` waits for its answer, so that several children can work at once."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise ChildError(f"{self.name}: it has ended") from error

    def receive(self) -> dict[str, Any]:
        """The answer to the last command. Raises ChildError."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ChildError(f"{self.name}: it ended with code {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ChildError(f"{self.name}: {answer['error']}")
        return answer

    def call(self, **command: Any) -> dict[str, Any]:
        """`send` and `receive`."""
        self.send(**command)
        return self.receive()

    def close(self) -> None:
        """End of input; the child then ends by itself."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def answer_commands(handle: Handler, **ready: Any) -> None:
    """The child's end: says `ready`, then answers commands until the input ends.

    What models and libraries print goes to standard error: standard output belongs to the answers.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def write(message: Mapping[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    write({"ready": True, **ready})
    for line in sys.stdin:
        try:
            write(handle(json.loads(line)))
        except Exception as error:
            write({"error": f"{type(error).__name__}: {error}"})
