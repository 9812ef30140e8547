"""Law 6: what is drawn follows the enumerated law; a broken sampler does not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from tests.laws.brute_force import BruteForce
from tests.laws.ensembles import LONG, NESTED, toys
from token_swarm.decoding.in_process import LocalEnsemble
from token_swarm.decoding.request import DecodeRequest
from token_swarm.mixing.sampling import Sampler, Sampling, inverse_cdf
from token_swarm.particle import Mixture, Rule

DRAWS = 1500
LENGTH = 3


def text_law(weights: dict[str, float]) -> dict[bytes, float]:
    """Probability of every text of up to LENGTH bytes (shorter ones have ended) under the linear mixture."""
    experts = toys([NESTED, LONG])
    brutes = [BruteForce(e.spec.vocabulary, e.law, e.encode("").tokens) for e in experts.values()]  # type: ignore[attr-defined]
    law: dict[bytes, float] = {}

    def extend(text: bytes, probability: float) -> None:
        if len(text) == LENGTH:
            law[text] = probability
            return
        mixed = sum(w * brute.next_law(text) for w, brute in zip(weights.values(), brutes, strict=True))
        law[text + b"$"] = probability * float(mixed[256])
        for byte in np.flatnonzero(mixed[:256]):
            extend(text + bytes((int(byte),)), probability * float(mixed[byte]))

    extend(b"", 1.0)
    return law


def p_value() -> float:
    """Chi-square of generated texts against the enumerated law."""
    weights = {"e0": 0.6, "e1": 0.4}
    expected = text_law(weights)
    assert sum(expected.values()) == pytest.approx(1, abs=1e-9)
    local = LocalEnsemble(toys([NESTED, LONG]))
    seen: Counter[bytes] = Counter()
    for seed in range(DRAWS):
        request = DecodeRequest(sampling=Sampling(), seed=seed, max_bytes=LENGTH, epsilon=0.0, window=None)
        text, finish = local.generate("", Mixture(weights, Rule.LINEAR), request)
        seen[text.encode() + (b"$" if finish.reason.value == "end_of_text" else b"")] += 1
    common = [text for text, probability in expected.items() if probability * DRAWS >= 5]
    observed = [seen[text] for text in common]
    wanted = [expected[text] * DRAWS for text in common]
    observed.append(DRAWS - sum(observed))
    wanted.append(DRAWS - sum(wanted))
    return float(stats.chisquare(observed, wanted).pvalue)


def test_generated_texts_follow_the_enumerated_law() -> None:
    assert p_value() > 1e-3


def test_a_broken_sampler_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: uniforms that are not quite uniform are told apart by the same test."""
    honest = Sampler.uniforms

    def bent(self: Sampler, count: int) -> npt.NDArray[np.float64] | None:
        uniforms = honest(self, count)
        return None if uniforms is None else uniforms**1.2

    monkeypatch.setattr(Sampler, "uniforms", bent)
    assert p_value() < 1e-6


@pytest.mark.parametrize("shape", [lambda law: law, lambda law: law.astype(np.float32)])
def test_inverse_cdf_follows_the_law_and_never_draws_the_impossible(
    shape: Callable[[npt.NDArray[np.float64]], npt.NDArray[np.floating]],
) -> None:
    random = np.random.default_rng(0)
    law = shape(np.array([0, 0.5, 0, 0.3, 1e-12, 0.2, 0], dtype=np.float64))
    counts = np.bincount([inverse_cdf(law, u) for u in random.random(20000)], minlength=7)
    assert counts[[0, 2, 6]].sum() == 0
    assert stats.chisquare(counts[[1, 3, 5]], 20000 * np.array([0.5, 0.3, 0.2])).pvalue > 1e-3
    assert inverse_cdf(law, 0.0) == 1
    assert inverse_cdf(law, np.nextafter(1.0, 0.0)) == 5
