"""How the union unit spells its texts for every expert, when it leaves one out, and what it refuses."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from token_swarm_server.coordinator.messages import request_from_proto

from tests.conftest import EXPERTS
from tests.laws.ensembles import BYTES, DUPLICATES, EXACT, GREEDY, LONG, NESTED, settle, toys
from tests.laws.union_definition import (
    UNION,
    WEIGHTS,
    Definition,
    by_text,
    lengths,
    segmentations,
    texts_of,
    union_unit,
)
from token_swarm.decoding.decoder import Decoder
from token_swarm.decoding.in_process import LocalEnsemble
from token_swarm.decoding.request import DecodeRequest, FinishReason
from token_swarm.errors import BadParameter, ExpertFault
from token_swarm.experts.contract import Expert
from token_swarm.experts.toy import END, TextLawExpert, ToyExpert
from token_swarm.experts.transformers.expert import TransformersExpert
from token_swarm.kernels import UnionMap
from token_swarm.mixing.byte_unit import ByteUnit
from token_swarm.mixing.groups import Unit
from token_swarm.mixing.token_unit import TokenUnit
from token_swarm.mixing.trie import ByteTrie
from token_swarm.mixing.union_unit import UnionUnit, spell
from token_swarm.particle import Mixture, Rule
from token_swarm.v1 import swarm_pb2
from token_swarm.vocabulary import Vocabulary


def test_characters_that_one_expert_writes_in_pieces() -> None:
    """Law 9, with a token that is half a character in every vocabulary and the whole one in one of them."""

    def text_law(text: bytes) -> np.ndarray:
        law = np.zeros(END + 1)
        if text.endswith(b"\xc3"):
            law[0xA9] = 1.0
        else:
            law[ord("a")], law[0xC3], law[END] = 0.4, 0.5, 0.1
        return law

    whole = Vocabulary((b"a", b"\xc3", b"\xa9", b"\xc3\xa9", None), eos_ids=(4,))
    pieces = Vocabulary((b"\xa9", b"\xc3", b"a", None), eos_ids=(3,))
    experts: dict[str, Expert] = {
        "e0": TextLawExpert("e0", whole, text_law, seed=1),
        "e1": TextLawExpert("e1", pieces, text_law, seed=2),
    }
    local, mixture = LocalEnsemble(experts), Mixture({"e0": 0.5, "e1": 0.5}, Rule.LINEAR)

    unit = union_unit(local, mixture)
    texts = texts_of(unit)
    for data, histories in (
        (b"\xc3", ((1,), (1,))),
        (b"\xa9", ((1, 2), (1, 0))),
        (b"\xc3\xa9", ((1, 2, 3), (1, 0, 1, 0))),
    ):
        settle(local, experts, unit)
        unit.advance(texts.index(data))
        assert tuple(unit.history(g)[1:] for g in range(2)) == histories
    assert [unit.respelled(g) for g in range(2)] == [0, 1]

    written = Counter[str]()
    for seed in range(30):
        request = DecodeRequest(unit=Unit.UNION, seed=seed, max_bytes=5)
        text, finish = local.generate("", mixture, request)
        assert finish.length == len(text.encode())
        written.update(text)
    assert written.keys() == {"a", "é"}


@st.composite
def spellings(draw: st.DrawFn) -> tuple[Vocabulary, bytes]:
    words = st.text("abc", min_size=1, max_size=4).map(str.encode)
    vocabulary = Vocabulary(tuple(draw(st.lists(words, min_size=1, max_size=8))), ())
    return vocabulary, draw(st.text("abc", min_size=1, max_size=9)).encode()


@settings(deadline=None)
@given(spellings())
def test_spelling_is_the_longest_that_goes_on(case: tuple[Vocabulary, bytes]) -> None:
    vocabulary, data = case
    splits = segmentations([word for word in vocabulary.token_bytes if word is not None], data)
    spelled = spell(ByteTrie.build(vocabulary), data)
    if not splits:
        assert spelled is None
        return
    longest = max(splits, key=lengths)
    assert spelled == [[t for t, own in enumerate(vocabulary.token_bytes) if own == word] for word in longest]


@pytest.mark.parametrize("rule", list(Rule))
def test_an_expert_that_cannot_write_the_text_is_left_out_and_reported(rule: Rule) -> None:
    short = Vocabulary((b"a", b"b", b"ab", None), eos_ids=(3,))
    experts = {"e0": ToyExpert("e0", short, seed=1), "e1": ToyExpert("e1", BYTES, seed=2)}
    local, mixture = LocalEnsemble(experts), Mixture({"e0": 0.8, "e1": 1.0}, rule)
    unit = union_unit(local, mixture, "ab")
    texts = texts_of(unit)
    assert settle(local, experts, unit) == 2
    assert unit.retired == 0
    unit.advance(texts.index(b"c"))
    assert unit.retired == 1
    assert settle(local, experts, unit) == 1
    own = Definition({"e1": experts["e1"]}, Mixture({"e1": 1.0})).own(0, unit.history(1))
    assert by_text(unit) == pytest.approx({b"ab": 0.0, **own}, abs=1e-12)
    assert unit.shares(texts.index(b"a")) == {"e0": 0.0, "e1": 1.0}


@pytest.mark.parametrize("rule", list(Rule))
def test_a_limit_on_tokens_ends_a_text_that_an_expert_cannot_write(
    rule: Rule, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(UnionUnit, "floor", math.log(0.5))
    experts = toys([Vocabulary((b"a", b"b", b"ab"), ()), Vocabulary((b"a", b"b", b"c"), ())])
    request = DecodeRequest(unit=Unit.UNION, max_tokens=12)
    text, finish = LocalEnsemble(experts).generate("ab", Mixture({"e0": 0.5, "e1": 0.5}, rule), request)
    assert len(text) > text.index("c") + 1
    assert finish.reason is FinishReason.MAX_TOKENS
    assert finish.retired == 1
    assert finish.experts["e0"].forwards < finish.experts["e1"].forwards == 12


def test_a_token_of_which_ids_are_equal_is_appended_as_the_likelier_one() -> None:
    class Second(ToyExpert):
        def law(self, tokens: tuple[int, ...]) -> torch.Tensor:
            row = super().law(tokens)
            row[3] = 9.0  # the second id of "ab"
            return row

    experts = {"e0": Second("e0", DUPLICATES, seed=1), "e1": ToyExpert("e1", BYTES, seed=2)}
    local = LocalEnsemble(experts)
    unit = union_unit(local, Mixture({"e0": 0.5, "e1": 0.5}))
    settle(local, experts, unit)
    unit.advance(texts_of(unit).index(b"ab"))
    assert unit.history(0)[-1] == 3
    assert unit.history(1)[-2:] == (0, 1)


def test_which_unit_is_made() -> None:
    local = LocalEnsemble(toys([NESTED, NESTED, LONG]))

    def kind(unit: Unit, *names: str) -> type:
        mixture = Mixture(dict.fromkeys(names, 1.0))
        return type(local.ensemble.unit(mixture, DecodeRequest(unit=unit), local.encode(mixture, "a")))

    assert kind(Unit.UNION, "e0") is TokenUnit
    assert kind(Unit.UNION, "e0", "e1") is UnionUnit
    assert kind(Unit.UNION, "e0", "e2") is UnionUnit
    assert kind(Unit.AUTO, "e0", "e1") is TokenUnit
    assert issubclass(kind(Unit.AUTO, "e0", "e2"), ByteUnit)
    with pytest.raises(BadParameter, match="'byte', 'union' or 'auto'"):
        kind(Unit.TOKEN, "e0", "e2")


def test_the_map_of_a_set_of_vocabularies_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    local = LocalEnsemble(toys([NESTED, NESTED, LONG]))
    made: list[int] = []
    build = UnionMap.build
    monkeypatch.setattr(UnionMap, "build", lambda tables: made.append(len(tables)) or build(tables))
    for names in (("e0", "e2"), ("e1", "e2"), ("e0", "e1", "e2"), ("e0", "e2")):
        union_unit(local, Mixture(dict.fromkeys(names, 1.0)))
    assert made == [2, 3]


def test_rows_that_are_no_law_name_their_expert() -> None:
    experts = toys([NESTED, LONG])
    local = LocalEnsemble(experts)
    unit = union_unit(local, Mixture(WEIGHTS))
    with pytest.raises(RuntimeError, match="feed what `due` names"):
        unit.law()
    first, second = unit.due()
    with pytest.raises(ExpertFault, match=r"'e0'.*\[8\]"):
        unit.feed(first, [torch.zeros(9)])
    unit.feed(first, [torch.zeros(8, dtype=torch.float64)])
    bad = torch.zeros(10, dtype=torch.float64)
    bad[2] = torch.nan
    with pytest.raises(ExpertFault, match=r"'e1': logits hold NaN"):
        unit.feed(second, [bad])


def test_experts_of_one_group_are_refused_as_one_row() -> None:
    local = LocalEnsemble(toys([NESTED, NESTED]))
    mixture = Mixture({"e0": 0.5, "e1": 0.5})
    with pytest.raises(ValueError, match=r"e0\+e1 has 2 experts, expected 1"):
        local.ensemble.union_unit(local.ensemble.groups(mixture), UNION, local.encode(mixture, "a"))


def test_the_end_of_the_text_is_not_appended() -> None:
    experts = toys([NESTED, LONG])
    local = LocalEnsemble(experts)
    unit = union_unit(local, Mixture(WEIGHTS))
    settle(local, experts, unit)
    end = texts_of(unit).index(None)
    assert [symbol for symbol in range(end + 1) if unit.ends(symbol)] == [end]
    with pytest.raises(ValueError, match="ends the text"):
        unit.advance(end)


def test_the_wire_knows_the_unit() -> None:
    message = swarm_pb2.GenerateRequest(prompt="x", unit=swarm_pb2.UNIT_UNION)
    request = request_from_proto(message, epsilon=EXACT.epsilon, window=None, draft_tokens=0, default_max_bytes=10)
    assert request.unit is Unit.UNION


REAL = ("smollm2", "gemma3")


@pytest.fixture(scope="module")
def real_local(real_expert: Callable[[str], TransformersExpert]) -> LocalEnsemble:
    return LocalEnsemble({name: real_expert(name) for name in REAL}, EXPERTS.parent / "tries")


@pytest.mark.real_experts
@pytest.mark.parametrize("rule", list(Rule))
def test_real_experts_write_one_text(real_local: LocalEnsemble, rule: Rule) -> None:
    mixture = Mixture(dict.fromkeys(REAL, 0.5), rule)
    request = DecodeRequest(sampling=GREEDY, unit=Unit.UNION, max_tokens=8)
    prompts = real_local.encode(mixture, "The history of the printing press begins in")
    unit = real_local.ensemble.unit(mixture, request, prompts)
    assert isinstance(unit, UnionUnit)
    decoder = Decoder(unit, request, allocate=real_local.allocate)
    shown = "".join(real_local.pieces(decoder))
    assert decoder.finish.reason is FinishReason.MAX_TOKENS
    assert shown.encode() == decoder.text
    assert len(shown.split()) >= 4
    for g, name in enumerate(REAL):
        history, prompt = unit.history(g), prompts[name].tokens
        assert history[: len(prompt)] == prompt
        assert real_local.ensemble.specs[name].vocabulary.text(history[len(prompt) :]) == decoder.text
        assert 0.1 < decoder.finish.experts[name].share < 0.9
        assert decoder.finish.experts[name].wasted == 0
