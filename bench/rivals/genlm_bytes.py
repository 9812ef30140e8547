"""genlm-bytes, the exact byte-level rival, on one model: run as a file by an interpreter that has it.

`make genlm` makes that virtual environment. The library's own settings: a beam of 5 and pruning at 0.05 are its
README's. It gets the KV of the prompt, and no time to wait for more queries to batch.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from child import answer_commands  # type: ignore[import-not-found]

BEAM = 5
PRUNE = 0.05
_MAX_SECONDS = 60.0
"""A text is cut here: a byte of a wide vocabulary can take a second."""
_FEWEST = 4


def main() -> None:
    """Answer commands: {"prompt": ..., "max_bytes": ..., "threads": ...}."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="directory of a causal language model")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    import torch
    from genlm.backend import load_model_by_name  # type: ignore[import-not-found]
    from genlm.bytes import AsyncTokenByteTrie, BeamParams, ByteBeamState  # type: ignore[import-not-found]
    from genlm.bytes.byte_lm.trie_state import LazyTrieState  # type: ignore[import-not-found]
    from genlm.bytes.trie import TrieMode  # type: ignore[import-not-found]
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()

    settings = {"timeout": 0.0, "hf_opts": {"torch_dtype": torch.float32, "device_map": None}}
    model = load_model_by_name(options.model, backend="hf", llm_opts=settings)
    end = model.byte_vocab[model.tokenizer.eos_token_id]
    ends = {bytes(getattr(end, "byte_string", end))}
    loop = asyncio.new_event_loop()

    async def build() -> Any:
        return AsyncTokenByteTrie.from_vocab(model.byte_vocab, eos_byte_strings=ends)

    # ByteBeamState.initial would build it again for every text.
    trie = loop.run_until_complete(build())

    async def write(prompt: str, max_bytes: int) -> Mapping[str, Any]:
        model.clear_cache()
        started = time.perf_counter()
        model.cache_kv(model.tokenizer.encode(prompt))
        state = await LazyTrieState.initial(model, trie, mode=TrieMode.WITH_EOS).materialize()
        beam = ByteBeamState([state], BeamParams(K=BEAM, prune_threshold=PRUNE, eos_byte_strings=ends))
        beam = await beam.prefill(prompt.encode())
        times: list[float] = []
        while len(times) < max_bytes and (len(times) < _FEWEST or time.perf_counter() - started < _MAX_SECONDS):
            law = await beam.logp_next()
            byte = int(law.ps[:256].argmax())
            times.append(time.perf_counter())
            beam = await (beam.prune() << byte)
        return {
            "first": times[0] - started,
            "total": times[-1] - started,
            "bytes": len(times),
            "rest": len(times) - 1,
            "pieces": len(times),
        }

    def handle(command: Mapping[str, Any]) -> Mapping[str, Any]:
        torch.set_num_threads(command["threads"])
        return loop.run_until_complete(write(command["prompt"], command["max_bytes"]))

    answer_commands(handle)


if __name__ == "__main__":
    main()
