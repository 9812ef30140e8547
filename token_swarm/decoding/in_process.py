"""Runs an ensemble in one process: experts as objects, no network."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from token_swarm.decoding.decoder import Decoder, Finish
from token_swarm.decoding.ensemble import Ensemble
from token_swarm.decoding.forwards import Calls, Outcome
from token_swarm.decoding.request import DecodeRequest
from token_swarm.decoding.score import Score, Scorer, scored_text
from token_swarm.decoding.windows import Window, encode_window, join_scores, plan_windows, token_lengths
from token_swarm.errors import BadParameter
from token_swarm.experts.contract import EncodedPrompt, Expert
from token_swarm.experts.registry import DEFAULT_BACKEND, EngineValue, load_expert
from token_swarm.particle import Mixture, Particle


class LocalEnsemble:
    """Experts in this process. Not for several threads at once; a context manager that closes the experts.

    A mixture is a `Mixture` or a `Particle`, which is refused where it was made for other vocabularies; None: all
    experts with equal weights, log-linear.
    """

    def __init__(self, experts: Mapping[str, Expert], cache: Path | None = None) -> None:
        """cache: folder that keeps the tries of the vocabularies, which take seconds to build."""
        self._experts = dict(experts)
        self.ensemble = Ensemble.of({name: expert.spec for name, expert in self._experts.items()}, cache)
        self._ids = itertools.count(1)

    @classmethod
    def load(
        cls,
        models: Mapping[str, str | Path],
        *,
        backend: str = DEFAULT_BACKEND,
        cache: Path | None = None,
        engine: Mapping[str, EngineValue] | None = None,
        device: str = "cpu",
        dtype: str = "auto",
        threads: int | None = None,
        max_sequences: int = 16,
        max_context: int = 2048,
    ) -> Self:
        """Load a model directory or hub id per name, all on one backend.

        What the keywords mean is what the backend makes of them: see `TransformersExpert` and `experts.registry`.
        threads is of the whole process. Raises ExpertLoadError, UnknownName for a backend that is not there, and
        PluginError.
        """
        experts: dict[str, Expert] = {}
        try:
            for name, model in models.items():
                experts[name] = load_expert(
                    backend,
                    name,
                    model,
                    engine=engine,
                    device=device,
                    dtype=dtype,
                    threads=threads,
                    max_sequences=max_sequences,
                    max_context=max_context,
                )
            return cls(experts, cache)
        except BaseException:
            for expert in experts.values():
                expert.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free every expert's model and sequences."""
        for expert in self._experts.values():
            expert.close()

    def _mixture(self, mixture: Mixture | Particle | None) -> Mixture:
        """Raises what `Particle.require_match` raises."""
        if isinstance(mixture, Particle):
            mixture.require_match({name: spec.vocabulary.fingerprint for name, spec in self.ensemble.specs.items()})
            return mixture.mixture
        return self.ensemble.uniform() if mixture is None else mixture

    def run(self, calls: Calls) -> dict[str, list[Outcome]]:
        """Run every expert's operations; one outcome per operation."""
        outcomes: dict[str, list[Outcome]] = {}
        for name, ops in calls.items():
            result = self._experts[name].step(ops)
            outcomes[name] = [error or result.rows(i) for i, error in enumerate(result.errors)]
        return outcomes

    def encode(self, mixture: Mixture, prompt: str, *, chat: bool = False) -> dict[str, EncodedPrompt]:
        """The prompt as each active expert reads it."""
        mixture.require_known(self._experts)
        return {name: self._experts[name].encode(prompt, chat=chat) for name in mixture.active}

    def decoder(
        self,
        prompt: str,
        mixture: Mixture,
        request: DecodeRequest,
        *,
        chat: bool = False,
        forced: bytes | None = None,
    ) -> Decoder:
        """A decoder for one text; drive it with `run`."""
        prompts = self.encode(mixture, prompt, chat=chat)
        unit = self.ensemble.unit(mixture, request, prompts)
        return Decoder(unit, request, allocate=self.allocate, forced=forced)

    def allocate(self, expert: str) -> int:
        """A sequence id nobody uses."""
        del expert
        return next(self._ids)

    def pieces(self, decoder: Decoder) -> Iterator[str]:
        """Drive a decoder to its end: text as it becomes complete. Frees the KV however the caller leaves."""
        try:
            while not decoder.finished:
                if calls := decoder.calls():
                    decoder.resume(self.run(calls))
                if text := decoder.take_text():
                    yield text
        finally:
            self.run(decoder.close())

    def stream(
        self,
        prompt: str,
        mixture: Mixture | Particle | None = None,
        request: DecodeRequest | None = None,
        *,
        chat: bool = False,
    ) -> Iterator[str]:
        """The text that continues `prompt`, in pieces of whole characters.

        request: None continues to the end of the text or of a context, sampled at temperature 1 with seed 0. Raises
        BadParameter for a prompt or settings that cannot be used, UnknownName and FingerprintMismatch for the mixture.
        """
        decoder = self.decoder(prompt, self._mixture(mixture), request or DecodeRequest(), chat=chat)
        return self.pieces(decoder)

    def generate(
        self,
        prompt: str,
        mixture: Mixture | Particle | None = None,
        request: DecodeRequest | None = None,
        *,
        chat: bool = False,
    ) -> tuple[str, Finish]:
        """The whole text of `stream`, and how it ended."""
        decoder = self.decoder(prompt, self._mixture(mixture), request or DecodeRequest(), chat=chat)
        text = "".join(self.pieces(decoder))
        return text, decoder.finish

    def score(
        self,
        prompt: str,
        text: str,
        mixture: Mixture | Particle | None = None,
        *,
        chat: bool = False,
        stride: int | None = None,
    ) -> Score:
        """Log-probability of `text` after `prompt`, under the ensemble and under each of its experts.

        A text that outgrows a context is scored in windows of `stride` bytes: see `decoding.windows`.
        """
        if not text:
            raise BadParameter("text", text, "at least one byte")
        mixture = self._mixture(mixture)
        prompts = self.encode(mixture, prompt, chat=chat)
        tokens = self._tokens(prompts, text)
        specs = self.ensemble.specs
        lengths = {name: token_lengths(specs[name], prompts[name], text, own) for name, own in tokens.items()}
        stride, windows = plan_windows(text.encode(), lengths, stride)
        if len(windows) == 1:
            return self._score(mixture, prompts, text, tokens)
        scores = []
        for window in windows:
            encoded = {name: self._encoded(name, prompts[name], text, window) for name in prompts}
            before = {name: own for name, (own, _) in encoded.items()}
            own = text.encode()[window.start : window.stop].decode()
            read = {name: tokens for name, (_, tokens) in encoded.items()}
            scores.append(self._score(mixture, before, own, read))
        return join_scores(stride, windows, scores)

    def _encoded(
        self, name: str, prompt: EncodedPrompt, text: str, window: Window
    ) -> tuple[EncodedPrompt, tuple[int, ...]]:
        """What an expert reads before a window, and the window's tokens."""
        expert, answer = self._experts[name], None
        steps = encode_window(expert.spec, prompt, text.encode(), window)
        while True:
            try:
                asked = steps.send(answer)
            except StopIteration as done:
                encoded: tuple[EncodedPrompt, tuple[int, ...]] = done.value
                return encoded
            answer = expert.encode(asked.text) if asked.as_prompt else expert.tokenize(asked.text)

    def _score(
        self,
        mixture: Mixture,
        prompts: Mapping[str, EncodedPrompt],
        text: str,
        tokens: Mapping[str, tuple[int, ...]],
        *,
        in_logs: bool = False,
    ) -> Score:
        scorer = Scorer(self.ensemble, mixture, prompts, text, tokens, self.allocate, in_logs=in_logs)
        try:
            while calls := scorer.calls():
                scorer.resume(self.run(calls))
        finally:
            self.run(scorer.close())
        return self._score(mixture, prompts, text, tokens, in_logs=True) if scorer.underflowed else scorer.score

    def scorer(self, prompt: str, text: str, mixture: Mixture) -> Scorer:
        """A scorer for a text that fits every context; drive it with `run`."""
        prompts = self.encode(mixture, prompt)
        return Scorer(self.ensemble, mixture, prompts, text, self._tokens(prompts, text), self.allocate)

    def _tokens(self, prompts: Mapping[str, EncodedPrompt], text: str) -> dict[str, tuple[int, ...]]:
        """Each expert's canonical tokens of what `scored_text` says."""
        return {
            name: self._experts[name].tokenize(scored_text(self.ensemble.specs[name], encoded, text)[1])
            for name, encoded in prompts.items()
        }
