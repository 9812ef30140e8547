"""The token unit: one group mixes whole tokens, as an ordinary ensemble does."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from token_swarm import kernels
from token_swarm.mixing.groups import Group, Unit
from token_swarm.mixing.sampling import Sampler, Sampling
from token_swarm.mixing.stopwatch import Part, Stopwatch
from token_swarm.mixing.unit import Need, Walk


class TokenUnit:
    """One group over one text. Symbols are token ids; the prompt keeps the expert's own encoding."""

    kind = Unit.TOKEN

    def __init__(self, group: Group, tokens: tuple[int, ...], sampling: Sampling) -> None:
        self.groups: Sequence[Group] = (group,)
        self.stopwatch = Stopwatch()
        self._sampling = sampling
        self._tokens = tokens
        self._prompt_length = len(tokens)
        self._law: Tensor | None = None
        self._members: list[Tensor] = []
        self._eos = frozenset(group.vocabulary.eos_ids)

    def due(self) -> list[Need]:
        """The whole history, once a token."""
        return [] if self._law is not None else [Need(0, self._tokens, None)]

    def ahead(self, need: Need, rows: Sequence[Tensor], stopwatch: Stopwatch) -> None:
        """Nothing: there is one group, so that nobody is waited for once its members have answered."""
        del need, rows, stopwatch

    def feed(self, need: Need, rows: Sequence[Tensor], made: None = None) -> None:
        """Mix the members' rows into the law of the next token."""
        del made
        group = self.groups[need.group]
        if self._sampling.is_wide:
            rows = [row.double() for row in rows]
        with self.stopwatch.measure(Part.MIX):
            self._law = self._sampling.apply(group.token_law(rows))
            self._members = group.member_laws(rows) if len(rows) > 1 else []

    def walk(self, sampler: Sampler, *, max_bytes: int, max_tokens: int | None) -> Walk:
        """Choose one token: the next needs a forward."""
        del max_bytes, max_tokens
        if self._law is None:
            raise RuntimeError("the history has not been forwarded: feed what `due` names first")
        if not float(self._law.amax()) > 0:  # of floats torch takes thirty times as long for `any`
            return Walk(ended=True)
        uniforms = sampler.uniforms(1)
        drawn = torch.tensor([0.0 if uniforms is None else uniforms[0]], dtype=torch.float64)
        tokens, log_probs = kernels.choose(self._law[None], drawn, torch.tensor([uniforms is None]))
        sampler.consume(1)
        token = int(tokens[0])
        walk = Walk(log_probs=[float(log_probs[0])], shares=self._shares(token), ended=token in self._eos)
        if not walk.ended:
            walk.data = self.groups[0].vocabulary.token_bytes[token] or b""
            self._tokens = (*self._tokens, token)
            self._law = None
        return walk

    def _shares(self, token: int) -> dict[str, float]:
        """Posterior share of each member in the chosen token."""
        group = self.groups[0]
        if not self._members:
            return {group.names[0]: 1.0}
        return group.split([float(law[token]) for law in self._members])

    def history(self, group: int) -> tuple[int, ...]:
        """The tokens themselves: the token unit knows no other tokenization."""
        del group
        return self._tokens

    def own_tokens(self, group: int) -> int:
        """Tokens appended to the prompt."""
        del group
        return len(self._tokens) - self._prompt_length

    def fewest_tokens(self) -> int:
        """Tokens appended to the prompt."""
        return self.own_tokens(0)

    @property
    def retired(self) -> float:
        """0: nothing is given up."""
        return 0.0
