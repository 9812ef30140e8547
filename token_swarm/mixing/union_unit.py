"""The union unit: whole tokens of different vocabularies, mixed as byte strings (GaC, UniTE). For comparison.

At every step each expert gives its next-token law after one tokenization of the text. Tokens that write the same bytes
are one token of the union vocabulary; the laws are mixed over it (`kernels.mix_union`), one union token is chosen and
its bytes are appended for every expert. Under the linear rule this is GaC (arXiv 2406.12585) and, without its cut to
each expert's top k, UniTE (arXiv 2410.03777). Temperature, min-p, top-k and top-p act on the *union law*.

An expert gives a union token that it does not have probability 0 under the linear rule. Under the log-linear rule,
where a single 0 would rule the token out, it gives it `floor`, and the same to any token that it holds less probable.

What is approximated, and what the byte unit does not need: an expert's history should be its tokenizer's own reading
of the text, but a unit has no tokenizer, and asking the expert for one would cost a round trip a token. As in GaC the
chosen token keeps its bounds in every history. An expert that has it as one token appends that token; another one
appends the longest of its tokens that write it, from the left, a shorter one only where the rest could not be written
otherwise. Of ids that write the same bytes (a letter and its byte-fallback token) it takes the one its last logits
prefer. So a history writes exactly the text, half a character included, but " Sof" and "ia" stay two tokens where the
tokenizer would have read " Sofia". `respelled` counts the union tokens that an expert was given in pieces.

An expert that cannot write the chosen bytes at all (some vocabularies lack rare bytes) is lost: it is not asked any
more, and what only lost experts have is never chosen. `retired` says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from token_swarm import kernels
from token_swarm.errors import BadLogits, NoContinuation
from token_swarm.experts.contract import EncodedPrompt
from token_swarm.kernels import UnionMap
from token_swarm.mixing.groups import Group, Unit, as_shares, is_distribution
from token_swarm.mixing.sampling import Sampler, Sampling
from token_swarm.mixing.stopwatch import Part, Stopwatch
from token_swarm.mixing.trie import ROOT, ByteTrie
from token_swarm.mixing.unit import Need, Walk, walk_by_symbol

DEFAULT_FLOOR = math.log(1e-10)
"""Log-probability (nats) of a token that an expert does not have, under the log-linear rule.

Such tokens are many, so the floor has to be low: with the two demo experts at weights 0.5 each, tokens that neither
holds above it have a quarter of the union law's mass at log(1e-6), 0.3% at log(1e-8), and nothing at log(1e-10).
"""


@dataclass(slots=True)
class _Reader:
    """One expert over the text.

    tokens: its history, the first `prompt` of them the prompt's. row: logits [width] after it; while they are not
    there, or once it is lost, those of an earlier history. respelled: union tokens it was given in pieces.
    unread: union tokens since it was lost.
    """

    trie: ByteTrie
    tokens: tuple[int, ...]
    prompt: int
    row: Tensor | None = None
    fresh: bool = False
    lost: bool = False
    respelled: int = 0
    unread: int = 0


class UnionUnit:
    """Several experts over one text, each a group of its own, those of equal vocabulary included.

    Symbols are places in `union.texts`; `union` is the map of the groups' vocabularies, in their order. `tries` maps a
    vocabulary fingerprint to its trie; `prompts` an expert to its encoding of the prompt, which is kept as it is.
    Raises ValueError for a group of several experts.
    """

    kind = Unit.UNION
    floor = DEFAULT_FLOOR

    def __init__(
        self,
        groups: Sequence[Group],
        union: UnionMap,
        tries: Mapping[str, ByteTrie],
        prompts: Mapping[str, EncodedPrompt],
        sampling: Sampling,
    ) -> None:
        for group in groups:
            if len(group.experts) != 1:
                raise ValueError(f"groups: {'+'.join(group.names)} has {len(group.experts)} experts, expected 1")
        self.groups: Sequence[Group] = tuple(groups)
        self.stopwatch = Stopwatch()
        self._union = union
        self._sampling = sampling
        self._readers: list[_Reader] = []
        for group in self.groups:
            tokens = prompts[group.names[0]].tokens
            self._readers.append(_Reader(tries[group.vocabulary.fingerprint], tokens, len(tokens)))
        self._law: npt.NDArray[Any] | None = None

    def due(self) -> list[Need]:
        """The history of every expert that is not lost, once a union token."""
        return [
            Need(g, reader.tokens, None) for g, reader in enumerate(self._readers) if not (reader.fresh or reader.lost)
        ]

    def ahead(self, need: Need, rows: Sequence[Tensor], stopwatch: Stopwatch) -> None:
        """Nothing: the law is one of all experts."""
        del need, rows, stopwatch

    def feed(self, need: Need, rows: Sequence[Tensor], made: None = None) -> None:
        """Keep an expert's row; the last one that is due makes the law."""
        del made
        (row,) = rows
        group = self.groups[need.group]
        if row.shape != (group.vocabulary.width,):
            raise BadLogits(group.names, f"logit row of shape {tuple(row.shape)}, not [{group.vocabulary.width}]")
        reader = self._readers[need.group]
        reader.row, reader.fresh = row, True
        if not self.due():
            with self.stopwatch.measure(Part.MIX):
                self._law = self._sampling.apply(self._mix()).numpy()

    def _mix(self) -> Tensor:
        """The union law before reshaping: [union.size], summing to 1."""
        rows = [reader.row for reader in self._readers if reader.row is not None]
        weights = [0.0 if reader.lost else g.weight for g, reader in zip(self.groups, self._readers, strict=True)]
        heats = [group.temperatures[0] for group in self.groups]
        # As in a group: mixed where the first expert leaves its logits, and only the mixture is moved.
        device = rows[0].device
        table = torch.tensor([weights, heats], dtype=torch.float64, device=device)
        logits = [(row.double() if self._sampling.is_wide else row)[None].to(device) for row in rows]
        rule = self.groups[0].rule
        mixed = kernels.mix_union(logits, table[:1], table[1:], rule, self._union, self.floor)[0].cpu()
        if bool(mixed[0].isnan()):
            self._blame()
        if any(reader.lost for reader in self._readers):
            for segment in self._union.segments:
                # Every living expert gives these the floor; nobody could read them.
                if all(self._readers[expert].lost for expert in segment.experts):
                    mixed[segment.low : segment.high] = 0.0
            mixed /= mixed.sum()
        return mixed

    def _blame(self) -> None:
        """Raise BadLogits for the experts whose rows are no law, whose histories are due again, or NoContinuation when
        all are."""
        bad = [
            index
            for index, (group, reader) in enumerate(zip(self.groups, self._readers, strict=True))
            if reader.row is not None and not reader.lost and not is_distribution(group.experts[0], reader.row)
        ]
        if not bad:
            raise NoContinuation(group.names[0] for group in self.groups)
        for index in bad:
            self._readers[index].fresh = False
        raise BadLogits([self.groups[index].names[0] for index in bad])

    def _own_laws(self) -> list[Tensor]:
        """Each expert's own token probabilities [width] at its temperature; zeros for a lost one."""
        return [
            torch.zeros(group.vocabulary.width)
            if reader.lost or reader.row is None
            else group.member_laws([reader.row])[0]
            for group, reader in zip(self.groups, self._readers, strict=True)
        ]

    def walk(self, sampler: Sampler, *, max_bytes: int, max_tokens: int | None) -> Walk:
        """Choose one union token: the next needs a forward."""
        return walk_by_symbol(self, sampler, max_bytes=max_bytes, max_tokens=max_tokens)

    def law(self) -> npt.NDArray[Any]:
        """Probabilities over union tokens: [union.size]."""
        if self._law is None:
            raise RuntimeError("a history has not been forwarded: feed what `due` names first")
        return self._law

    def relaxed_law(self) -> npt.NDArray[Any]:
        """All zeros: what is shaped is the mixture, which always leaves something."""
        return self.law()

    def ends(self, symbol: int) -> bool:
        """Whether the union token is the end of the text."""
        return self._union.texts[symbol] is None

    def advance(self, symbol: int) -> bytes:
        """Append one union token to every history."""
        data = self._union.texts[symbol]
        if data is None:
            raise ValueError(f"symbol: {symbol} ends the text and cannot be appended")
        for reader in self._readers:
            if not reader.lost:
                _append(reader, data)
            reader.unread += reader.lost
        self._law = None
        return data

    def shares(self, symbol: int) -> dict[str, float]:
        """Posterior share of each expert in the chosen token, with |weight| as prior under either rule."""
        data = self._union.texts[symbol]
        given: dict[str, float] = {}
        for group, reader, own in zip(self.groups, self._readers, self._own_laws(), strict=True):
            ids = list(group.vocabulary.eos_ids) if data is None else _ids(reader.trie, data)
            given[group.names[0]] = abs(group.weight) * float(own[ids].sum())
        return as_shares(given)

    def history(self, group: int) -> tuple[int, ...]:
        """The tokens an expert reads, up to where it was lost."""
        return self._readers[group].tokens

    def own_tokens(self, group: int) -> int:
        """Tokens of an expert beyond the prompt's.

        Union tokens that it could not read stand for one each, so that a limit on tokens still ends the text.
        """
        reader = self._readers[group]
        return len(reader.tokens) - reader.prompt + reader.unread

    def fewest_tokens(self) -> int:
        """Tokens of the expert that needs fewest."""
        return min(self.own_tokens(group) for group in range(len(self.groups)))

    def respelled(self, group: int) -> int:
        """Union tokens of the text that an expert does not have and was given in pieces."""
        return self._readers[group].respelled

    @property
    def certificate(self) -> float:
        """1, the bound that says nothing: none is known for a law after a single tokenization."""
        return 1.0

    @property
    def retired(self) -> float:
        """1 once an expert is lost, else 0: the one tokenization that is followed is never given up."""
        return float(any(reader.lost for reader in self._readers))


def _append(reader: _Reader, data: bytes) -> None:
    spelled = spell(reader.trie, data)
    if spelled is None or reader.row is None:
        reader.lost = True
        return
    row = reader.row
    reader.tokens += tuple(max(ids, key=lambda token: float(row[token])) for ids in spelled)
    reader.respelled += len(spelled) > 1
    reader.fresh = False


def _ids(trie: ByteTrie, data: bytes) -> list[int]:
    """Ids that write exactly `data`."""
    node = trie.find(data)
    return [] if node is None else trie.exact(node)


def spell(trie: ByteTrie, data: bytes) -> list[list[int]] | None:
    """`data` in the longest tokens, from the left; None when no tokens write it.

    Returns for each token the ids that write it, the lowest first. A shorter token is taken where no tokens write what
    would follow the longer one: with the tokens a, ab and bc, "abc" is a, bc.
    """
    if whole := _ids(trie, data):
        return [whole]
    pieces: list[tuple[list[int], int] | None] = [None] * len(data)  # by start: the token there, and its end
    for start in reversed(range(len(data))):
        node = ROOT
        for end in range(start + 1, len(data) + 1):
            below = trie.child(node, data[end - 1])
            if below is None:
                break
            node = below
            ids = trie.exact(node)
            if ids and (end == len(data) or pieces[end] is not None):
                pieces[start] = ids, end
    spelled, at = [], 0
    while at < len(data):
        piece = pieces[at]
        if piece is None:
            return None
        spelled.append(piece[0])
        at = piece[1]
    return spelled
