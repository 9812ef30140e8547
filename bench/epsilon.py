"""What epsilon costs and what it buys: `python -m bench.epsilon --help`.

Follows texts byte by byte with the decoder's own heads (not the scorer's single pass) and counts forwards.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch

from bench.common import print_facts, print_json
from token_swarm.decoding.in_process import LocalEnsemble
from token_swarm.decoding.request import DecodeRequest
from token_swarm.experts.transformers.expert import TransformersExpert
from token_swarm.particle import Mixture, Rule


def follow(local: LocalEnsemble, prompt: str, text: str, request: DecodeRequest, mixture: Mixture) -> dict[str, object]:
    """Follow `text`; bits per byte, forwards and time."""
    decoder = local.decoder(prompt, mixture, request, forced=text.encode())
    started, steps = time.perf_counter(), 0
    try:
        while calls := decoder.calls():
            decoder.resume(local.run(calls))
            steps += 1
    finally:
        local.run(decoder.close())
    seconds, finish = time.perf_counter() - started, decoder.finish
    return {
        "epsilon": request.epsilon,
        "window": request.window,
        "bytes": finish.length,
        "bits_per_byte": -sum(decoder.log_probs) / math.log(2) / finish.length,
        "forwards_per_token": {name: use.forwards / use.tokens for name, use in finish.experts.items()},
        "steps_per_token": steps / max(use.tokens for use in finish.experts.values()),
        "certificate": finish.certificate,
        "retired": finish.retired,
        "ms_per_byte": 1000 * seconds / finish.length,
    }


def main() -> None:
    """Print one row per epsilon, over all texts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--expert", action="append", required=True, metavar="NAME=DIRECTORY")
    parser.add_argument("--text-file", action="append", required=True, type=Path)
    parser.add_argument("--bytes", type=int, default=400, help="bytes followed in each text, after 64 of prompt")
    parser.add_argument("--epsilon", type=float, nargs="+", default=[1e-4, 1e-3, 1e-2, 5e-2, 1e-1])
    parser.add_argument("--window", type=int, default=8, help="0: keep the bound on every path")
    parser.add_argument("--rule", choices=[rule.value for rule in Rule], default=Rule.LOG_LINEAR.value)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    paths = dict(pair.split("=", 1) for pair in options.expert)
    experts = {name: TransformersExpert(name, path, threads=1) for name, path in paths.items()}
    local = LocalEnsemble(experts)
    mixture = local.ensemble.uniform(Rule(options.rule))
    rows = []
    if not options.json:
        print_facts()
    for epsilon in options.epsilon:
        request = DecodeRequest(epsilon=epsilon, window=options.window or None)
        for path in options.text_file:
            text = path.read_text(encoding="utf-8")
            row = follow(local, text[:64], text[64 : 64 + options.bytes], request, mixture)
            rows.append({"text": path.name, **row})
            if not options.json:
                per_token: dict[str, float] = row["forwards_per_token"]  # type: ignore[assignment]
                forwards = "  ".join(f"{name} {n:.2f}" for name, n in per_token.items())
                print(
                    f"{path.name:14} eps {epsilon:<7g} bits/byte {row['bits_per_byte']:.4f}  "
                    f"forwards/token {forwards}  steps/token {row['steps_per_token']:.2f}  "
                    f"certificate {row['certificate']:.3g}  retired {row['retired']:.3g}  "
                    f"{row['ms_per_byte']:.0f} ms/byte",
                    flush=True,
                )
    if options.json:
        print_json("epsilon", {"rows": rows})


if __name__ == "__main__":
    main()
