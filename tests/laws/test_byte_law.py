"""Laws 1 and 8: the byte law is the sum over all tokenizations, and epsilon bounds the distance from it."""

from __future__ import annotations

import numpy as np
import pytest

from tests.laws.brute_force import BruteForce
from tests.laws.ensembles import EXACT, VOCABULARIES, byte_unit, settle, total_variation, toys, words
from token_swarm.decoding.in_process import LocalEnsemble
from token_swarm.decoding.request import DecodeRequest
from token_swarm.particle import Mixture, Rule

ONE = Mixture({"e0": 1.0})


@pytest.mark.parametrize("name", VOCABULARIES)
@pytest.mark.parametrize("text", [*words("abc", 4)[::5], b"abcabcab", b"aaaaaaa"])
def test_byte_law_equals_brute_force(name: str, text: bytes) -> None:
    experts = toys([VOCABULARIES[name]])
    local = LocalEnsemble(experts)
    unit = byte_unit(local, ONE, "ab", keep_tail=True)
    brute = BruteForce(VOCABULARIES[name], experts["e0"].law, experts["e0"].encode("ab").tokens)
    for position, byte in enumerate(text):
        settle(local, experts, unit)
        np.testing.assert_allclose(unit.law(), brute.next_law(text[:position]), rtol=0, atol=1e-12)
        unit.advance(byte)
    settle(local, experts, unit)
    np.testing.assert_allclose(unit.law(), brute.next_law(text), rtol=0, atol=1e-12)
    assert unit.certificate <= 1e-15


def test_pending_prompt_tail_is_conditioned_on() -> None:
    """A prompt that ends inside a token: the law is that of the text after the last token is taken back."""
    vocabulary = VOCABULARIES["nested"]
    experts = toys([vocabulary])
    local = LocalEnsemble(experts)
    tokens = experts["e0"].encode("cab").tokens
    unit = byte_unit(local, ONE, "cab")
    settle(local, experts, unit)
    brute = BruteForce(vocabulary, experts["e0"].law, tokens[:-1])
    np.testing.assert_allclose(unit.law(), brute.next_law(vocabulary.token_bytes[tokens[-1]]), rtol=0, atol=1e-12)
    assert vocabulary.token_bytes[tokens[-1]] == b"ab"
    assert unit.law()[ord("c")] > 0  # 'abc' is still reachable


@pytest.mark.parametrize("rule", list(Rule))
def test_mixed_law_equals_mixture_of_brute_force(rule: Rule) -> None:
    experts = toys([VOCABULARIES["nested"], VOCABULARIES["duplicates"], VOCABULARIES["long"]])
    local = LocalEnsemble(experts)
    weights = {"e0": 0.5, "e1": 0.2, "e2": 0.7 if rule is Rule.LINEAR else -0.3}
    unit = byte_unit(local, Mixture(weights, rule), "b", keep_tail=True)
    brutes = [BruteForce(expert.spec.vocabulary, expert.law, expert.encode("b").tokens) for expert in experts.values()]
    text = b""
    for byte in b"abcaab":
        settle(local, experts, unit)
        laws = [brute.next_law(text) for brute in brutes]
        if rule is Rule.LINEAR:
            expected = sum(w * law for w, law in zip(weights.values(), laws, strict=True)) / sum(weights.values())
        else:
            possible = np.all([law > 0 for law in laws], axis=0)
            with np.errstate(divide="ignore"):
                logs = sum(
                    w * np.where(possible, np.log(law), 0) for w, law in zip(weights.values(), laws, strict=True)
                )
            expected = np.where(possible, np.exp(logs), 0)
            expected /= expected.sum()
        np.testing.assert_allclose(unit.law(), expected, rtol=0, atol=1e-12)
        unit.advance(byte)
        text += bytes((byte,))


@pytest.mark.parametrize("epsilon", [0.3, 0.1, 0.01])
@pytest.mark.parametrize("name", VOCABULARIES)
def test_total_variation_is_within_the_certificate_on_every_path(name: str, epsilon: float) -> None:
    """Law 8, with surprising texts on purpose: every text over the alphabet, not only likely ones."""
    experts = toys([VOCABULARIES[name]], sharpness=2.0)
    local = LocalEnsemble(experts)
    brute = BruteForce(VOCABULARIES[name], experts["e0"].law, experts["e0"].encode("ab").tokens)
    worst, forwards, exact_forwards = 0.0, 0, 0
    for text in words("abc", 6)[-400::7]:
        unit = byte_unit(local, ONE, "ab", DecodeRequest(epsilon=epsilon, window=None), keep_tail=True)
        exact = byte_unit(local, ONE, "ab", EXACT, keep_tail=True)
        for position, byte in enumerate(text):
            forwards += settle(local, experts, unit)
            exact_forwards += settle(local, experts, exact)
            distance = total_variation(unit.law(), brute.next_law(text[:position]))
            worst = max(worst, distance)
            assert distance <= unit.certificate + 1e-12
            assert unit.certificate <= epsilon
            unit.advance(byte)
            exact.advance(byte)
    if name != "bytes":  # where every token is a byte there is one tokenization and nothing to leave out
        assert worst > 0
        assert forwards < exact_forwards


def test_plain_dropping_breaks_the_bound() -> None:
    """The mutant of law 8: giving cold heads up at once leaves a distance far above epsilon."""
    epsilon, worst = 0.02, 0.0
    for seed_name in ("nested", "duplicates", "long"):
        experts = toys([VOCABULARIES[seed_name]], sharpness=3.0)
        local = LocalEnsemble(experts)
        brute = BruteForce(VOCABULARIES[seed_name], experts["e0"].law, experts["e0"].encode("ab").tokens)
        for text in words("abc", 6)[-400::13]:
            unit = byte_unit(local, ONE, "ab", DecodeRequest(epsilon=epsilon, window=1), keep_tail=True)
            for position, byte in enumerate(text):
                settle(local, experts, unit)
                if unit.states[0].lost:
                    break
                worst = max(worst, total_variation(unit.law(), brute.next_law(text[:position])))
                unit.advance(byte)
    assert worst > 2 * epsilon


def test_given_up_shares_are_reported() -> None:
    experts = toys([VOCABULARIES["nested"]], sharpness=2.0)
    local = LocalEnsemble(experts)
    unit = byte_unit(local, ONE, "ab", DecodeRequest(epsilon=0.05, window=2), keep_tail=True)
    for byte in b"abcabcaabbcc":
        settle(local, experts, unit)
        unit.advance(byte)
    assert 0 < unit.retired < 1


def test_epsilon_zero_is_exact_whatever_the_window() -> None:
    experts = toys([VOCABULARIES["nested"]])
    local = LocalEnsemble(experts)
    brute = BruteForce(VOCABULARIES["nested"], experts["e0"].law, experts["e0"].encode("ab").tokens)
    unit = byte_unit(local, ONE, "ab", DecodeRequest(epsilon=0.0, window=1), keep_tail=True)
    for byte in b"abcab":
        settle(local, experts, unit)
        unit.advance(byte)
    settle(local, experts, unit)
    np.testing.assert_allclose(unit.law(), brute.next_law(b"abcab"), rtol=0, atol=1e-12)
    assert unit.retired == 0
