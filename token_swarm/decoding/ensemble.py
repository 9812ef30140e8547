"""Builds what a request needs: groups from a mixture, tries, and the mixing unit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from token_swarm.decoding.request import DecodeRequest
from token_swarm.errors import PromptTooLong
from token_swarm.experts.contract import EncodedPrompt, ExpertSpec
from token_swarm.kernels import UnionMap
from token_swarm.mixing.byte_unit import ByteUnit
from token_swarm.mixing.groups import Group, Unit, make_groups, make_rows, resolve_unit
from token_swarm.mixing.log_unit import LogUnit
from token_swarm.mixing.native_unit import byte_unit_type
from token_swarm.mixing.sampling import Sampling
from token_swarm.mixing.token_unit import TokenUnit
from token_swarm.mixing.trie import ByteTrie
from token_swarm.mixing.union_unit import UnionUnit
from token_swarm.mixing.unit import MixingUnit
from token_swarm.particle import Mixture, Rule


@dataclass(frozen=True)
class Ensemble:
    """The experts that may be mixed, the tries of their vocabularies, and the unions of those that were asked for."""

    specs: Mapping[str, ExpertSpec]
    tries: Mapping[str, ByteTrie]
    _unions: dict[tuple[str, ...], UnionMap] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, specs: Mapping[str, ExpertSpec], cache: Path | None = None) -> Ensemble:
        """Build, or load from `cache`, one trie per vocabulary."""
        vocabularies = {spec.vocabulary.fingerprint: spec.vocabulary for spec in specs.values()}
        tries = {key: ByteTrie.cached(vocabulary, cache) for key, vocabulary in vocabularies.items()}
        return cls(dict(specs), tries)

    def uniform(self, rule: Rule = Rule.LOG_LINEAR) -> Mixture:
        """Every expert with the same weight; the weights add up to 1."""
        return Mixture({name: 1 / len(self.specs) for name in self.specs}, rule)

    def groups(self, mixture: Mixture) -> tuple[Group, ...]:
        """The groups that `mixture` runs."""
        return make_groups(self.specs, mixture)

    def unit(self, mixture: Mixture, request: DecodeRequest, prompts: Mapping[str, EncodedPrompt]) -> MixingUnit:
        """The mixing unit of one text. `prompts`: the prompt as each active expert encodes it.

        Raises UnknownName and BadParameter for what the mixture or the request asks for in vain, PromptTooLong when
        the prompt leaves an expert no room for one more token.
        """
        groups = self.groups(mixture)
        kind = resolve_unit(request.unit, groups)
        for group in groups:
            for spec in group.experts:
                length = len(prompts[spec.name].tokens)
                if length >= spec.max_context:
                    raise PromptTooLong(spec.name, length, spec.max_context)
        if kind is Unit.TOKEN:
            return TokenUnit(groups[0], prompts[groups[0].names[0]].tokens, request.sampling)
        if kind is Unit.UNION:
            return self.union_unit(make_rows(self.specs, mixture), request, prompts)
        return self.byte_unit(groups, request, prompts)

    def continued(
        self, kind: Unit, mixture: Mixture, request: DecodeRequest, texts: Mapping[str, EncodedPrompt]
    ) -> MixingUnit:
        """A unit that goes on with a text that another one of `kind` began. texts: prompt and text as each expert
        encodes them.

        Bytes stay bytes, even of a single group: the text may end inside a token. Raises as `unit` does.
        """
        unit = self.unit(mixture, replace(request, unit=Unit.AUTO if kind is Unit.BYTE else kind), texts)
        if kind is Unit.BYTE and unit.kind is not Unit.BYTE:
            return self.byte_unit(self.groups(mixture), request, texts)
        return unit

    def byte_unit(
        self, groups: tuple[Group, ...], request: DecodeRequest, prompts: Mapping[str, EncodedPrompt]
    ) -> ByteUnit:
        """The byte unit over any groups, even a single one, whose marginal byte law it then is."""
        # Epsilon 0 asks for the exact law, which gives nothing up.
        window = request.window if request.epsilon > 0 else None
        kind = byte_unit_type(groups[0].rule)
        return kind(groups, self.tries, prompts, request.sampling, epsilon=request.epsilon, window=window)

    def union_unit(
        self, rows: tuple[Group, ...], request: DecodeRequest, prompts: Mapping[str, EncodedPrompt]
    ) -> UnionUnit:
        """The union unit over groups of one expert each. The first one of a set of vocabularies makes their map,
        about 3 us per token; it is kept for as long as the ensemble.
        """
        key = tuple(group.vocabulary.fingerprint for group in rows)
        if key not in self._unions:
            self._unions[key] = UnionMap.build([group.vocabulary for group in rows])
        return UnionUnit(rows, self._unions[key], self.tries, prompts, request.sampling)

    def log_score_unit(self, groups: tuple[Group, ...], prompts: Mapping[str, EncodedPrompt]) -> LogUnit:
        """The same as `score_unit` in logarithms."""
        return LogUnit(groups, self.tries, prompts)

    def score_unit(self, groups: tuple[Group, ...], prompts: Mapping[str, EncodedPrompt]) -> ByteUnit:
        """A byte unit that follows the heads it is fed: none is ever due, a cold one is given up after one byte."""
        return byte_unit_type(groups[0].rule)(groups, self.tries, prompts, Sampling(), epsilon=1.0, window=1)
