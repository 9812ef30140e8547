"""`token-swarm demo`: each expert alone, then the ensemble, on one prompt and two texts that nobody trained on."""

from __future__ import annotations

import asyncio
import json
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from token_swarm_server.cli import options, session
from token_swarm_server.config.loading import load_settings
from token_swarm_server.config.places import DEMO_CONFIG

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from token_swarm.v1 import swarm_pb2, swarm_pb2_grpc
    from token_swarm_server.cli.demo_display import DemoDisplay

PROMPT = "What is the difference between a list and a tuple in Python?"
BYTES = 162
"""Of that prompt's answer: there the ensemble's ends a sentence."""
TEXTS = {
    "prose": (
        "The ferry left the harbour an hour late because the captain had waited for the mail. Nobody on board "
        "complained: the sea was calm, the kitchen sold hot soup, and from the upper deck one could see the lights "
        "of three villages along the shore."
    ),
    "code": (
        "def longest_line(path: Path) -> int:\n"
        '    """Length of the longest line of a text file, in characters."""\n'
        "    with path.open() as file:\n"
        "        return max((len(line.rstrip()) for line in file), default=0)\n"
    ),
}
"""Written for this demo, so that no expert has read them."""
AGREED = math.log(1.25)
"""Nats: experts whose probabilities of a word are within a quarter of each other agree on it."""


@dataclass(frozen=True)
class Written:
    """A text that was generated, and what was said of it."""

    text: str
    finish: swarm_pb2.Finish

    @property
    def ms_per_byte(self) -> float:
        """Milliseconds, prefill included."""
        return 1000 * self.finish.timings.total_seconds / max(1, self.finish.bytes)


@dataclass(frozen=True)
class Word:
    """A word, and the expert that carried it: the one that gave it the highest probability; None where they agreed."""

    text: str
    carried: str | None


@dataclass(frozen=True)
class Demo:
    """Everything that the demo found out. `scores`: bits per byte by text, then by expert; "" is the ensemble.

    `words`: the ensemble's text, cut before the space in front of each word, with the expert that carried the word.
    """

    prompt: str
    alone: Mapping[str, Written]
    ensemble: Written
    weights: Mapping[str, float]
    words: list[Word]
    scores: Mapping[str, Mapping[str, float]]


def demo(
    prompt: Annotated[str, typer.Option(help="Question to answer.")] = PROMPT,
    plain: Annotated[bool, typer.Option("--plain", help="The prompt is a text to continue, no question.")] = False,
    max_bytes: Annotated[int, typer.Option(help="Most bytes to write.", min=1, max=2**32)] = BYTES,
    temperature: Annotated[float, typer.Option(help="Below 0.001 greedy, at most 100.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Same seed, same text.", min=0, max=options.UINT64)] = 1,
    cache: options.Cache = None,
    as_json: options.Json = False,
) -> None:
    """Show two small models alone and as one.

    Starts SmolLM2-135M-Instruct and Qwen2.5-Coder-0.5B-Instruct, has each answer alone and then both together, and
    measures how well each and both predict two texts. The first run fetches and converts them (0.6 GB to fetch,
    1.3 GB to keep); later ones take seconds.

    \b
    Examples:
      token-swarm demo
      token-swarm demo --prompt "How do vaccines work?" --max-bytes 400
      token-swarm demo --plain --prompt "Once upon a time" --temperature 0.8 --seed 7
    """
    from token_swarm.v1 import swarm_pb2
    from token_swarm_server.cli.demo_display import DemoDisplay

    settings = load_settings(DEMO_CONFIG, **({"cache": cache} if cache else {}))
    request = swarm_pb2.GenerateRequest(
        prompt=options.read_text("--prompt", prompt),
        chat=not plain,
        sampling=swarm_pb2.Sampling(temperature=temperature, seed=seed),
        max_bytes=max_bytes,
    )
    display = DemoDisplay(list(settings.experts), quiet=as_json)

    async def call(stub: swarm_pb2_grpc.SwarmServiceAsyncStub) -> Demo:
        return await _run(stub, request, list(settings.experts), settings.coordinator.weights, display)

    found = session.with_own_server(settings, call)
    if as_json:
        print(json.dumps(document(found)))
    else:
        display.show_table(found)


async def _run(
    stub: swarm_pb2_grpc.SwarmServiceAsyncStub,
    request: swarm_pb2.GenerateRequest,
    names: list[str],
    weights: Mapping[str, float],
    display: DemoDisplay,
) -> Demo:
    from token_swarm.v1 import swarm_pb2

    display.show_prompt(request.prompt, chat=request.chat)
    alone = {}
    for name in names:
        lone = swarm_pb2.GenerateRequest()
        lone.CopyFrom(request)
        lone.mixture.CopyFrom(swarm_pb2.Mixture(weights=[swarm_pb2.ExpertWeight(expert=name, weight=1)]))
        with display.text(name) as write:
            alone[name] = await _write(stub, lone, write)
    with display.text("") as write:
        ensemble = await _write(stub, request, write)
        words = await _words(stub, request, ensemble.text) if ensemble.text else []
        write.colour(words)
    display.show_legend()
    with display.busy("scoring two texts"):
        answers = await asyncio.gather(*(stub.Score(swarm_pb2.ScoreRequest(text=text)) for text in TEXTS.values()))
    scores = {title: _bits_per_byte(answer) for title, answer in zip(TEXTS, answers, strict=True)}
    return Demo(request.prompt, alone, ensemble, weights, words, scores)


async def _write(
    stub: swarm_pb2_grpc.SwarmServiceAsyncStub, request: swarm_pb2.GenerateRequest, write: Callable[[str], object]
) -> Written:
    from token_swarm_server.cli.client import stream_text

    pieces: list[str] = []

    def take(piece: str) -> None:
        pieces.append(piece)
        write(piece)

    finish = await stream_text(stub, request, take)
    return Written("".join(pieces), finish)


async def _words(
    stub: swarm_pb2_grpc.SwarmServiceAsyncStub, request: swarm_pb2.GenerateRequest, text: str
) -> list[Word]:
    """See `Demo.words`: the server scores the ensemble's text, which has each expert's probability of each byte."""
    from token_swarm.v1 import swarm_pb2

    score = await stub.Score(swarm_pb2.ScoreRequest(prompt=request.prompt, text=text, chat=request.chat, per_byte=True))
    return carried_words(text, {each.expert: list(each.byte_log_probs) for each in score.experts})


def carried_words(text: str, log_probs: Mapping[str, list[float]]) -> list[Word]:
    """See `Demo.words`. `log_probs`: nats of each byte of `text`, by expert.

    A word is carried by nobody where the two best experts are within `AGREED` of each other.
    """
    words = []
    at = 0
    for word in re.findall(r"\s*\S+|\s+$", text):
        size = len(word.encode())
        ranked = sorted(((sum(nats[at : at + size]), name) for name, nats in log_probs.items()), reverse=True)
        ahead = len(ranked) < 2 or ranked[0][0] - ranked[1][0] > AGREED
        words.append(Word(word, ranked[0][1] if ahead else None))
        at += size
    return words


def _bits_per_byte(score: swarm_pb2.ScoreResponse) -> dict[str, float]:
    nats = {"": score.log_prob, **{each.expert: each.log_prob for each in score.experts}}
    return {name: -value / (math.log(2) * score.bytes) for name, value in nats.items()}


def document(found: Demo) -> dict[str, Any]:
    """Everything as one JSON object."""
    from token_swarm_server.cli.client import plain

    def written(each: Written) -> dict[str, Any]:
        return {"text": each.text, "ms_per_byte": each.ms_per_byte, **plain(each.finish)}

    return {
        "prompt": found.prompt,
        "weights": dict(found.weights),
        "alone": {name: written(each) for name, each in found.alone.items()},
        "ensemble": {
            **written(found.ensemble),
            "words": [{"text": word.text, "carried": word.carried} for word in found.words],
        },
        "bits_per_byte": {
            title: {"ensemble": bits[""], "experts": {name: value for name, value in bits.items() if name}}
            for title, bits in found.scores.items()
        },
    }
