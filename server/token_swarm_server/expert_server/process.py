"""What runs in the process of one expert: load the model, or say in one line why not, and serve it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

from token_swarm.errors import BadParameter, PluginError
from token_swarm_server.config.settings import ExpertSettings
from token_swarm_server.rpc.host import LOCAL, Access

STOP_SECONDS = 5.0
"""Given to an expert that was asked to stop before it is killed."""


class ExpertStartError(RuntimeError):
    """An expert cannot be served as asked. The message is one line."""


def run_expert(
    name: str,
    model: str,
    settings: ExpertSettings,
    address: str,
    *,
    access: Access = LOCAL,
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Load `model` (a directory or Hugging Face id) and serve it at `address` until SIGTERM or SIGINT.

    `on_ready` is called with the bound address. Raises ExpertStartError.
    """
    # Minutes of imports would otherwise pass before a wrong flag is reported.
    from token_swarm.experts.loading import ExpertLoadError
    from token_swarm.experts.registry import load_expert
    from token_swarm_server.expert_server.server import serve

    try:
        # A new process is what helps against a worker that died, and what the launcher makes of it.
        expert = load_expert(settings.backend, name, model, **settings.backend_options(), on_failure=_stop)
    except (ExpertLoadError, BadParameter, PluginError, MemoryError) as error:
        reason = " ".join(str(error).split()) or "out of memory"
        raise ExpertStartError(f"expert {name!r}: {reason}") from error
    try:
        asyncio.run(serve(expert, address, access=access, on_ready=on_ready))
    except BadParameter as error:
        raise ExpertStartError(f"expert {name!r}: {error}") from error


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def stop_when_input_ends() -> None:
    """Stop this process once its standard input ends.

    The launcher holds the other end of that pipe, and the kernel closes it however it leaves, even by
    SIGKILL. Unlike prctl(PR_SET_PDEATHSIG) this does not depend on which thread started the process.
    """

    def watch() -> None:
        with contextlib.suppress(OSError):
            while os.read(sys.stdin.fileno(), 4096):
                pass
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(STOP_SECONDS)
        # A model that hangs in native code never sees the signal's handler.
        os._exit(1)

    threading.Thread(target=watch, name="parent watch", daemon=True).start()
