"""What is made of one expert's rows while others compute changes nothing: neither texts nor faults."""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread

import pytest
import torch

from tests.laws.ensembles import GREEDY, LONG, NESTED, toys
from token_swarm.decoding.decoder import Decoder
from token_swarm.decoding.forwards import Outcome
from token_swarm.decoding.in_process import LocalEnsemble
from token_swarm.decoding.request import DecodeRequest
from token_swarm.errors import BadLogits
from token_swarm.experts.contract import OpError, OpErrorKind
from token_swarm.mixing.groups import Unit
from token_swarm.mixing.sampling import Sampling
from token_swarm.mixing.stopwatch import Stopwatch
from token_swarm.particle import Mixture, Rule

MIXTURE = Mixture({"e0": 0.5, "e1": 0.3, "e2": 0.2}, Rule.LOG_LINEAR)


@pytest.fixture
def local() -> LocalEnsemble:
    """Two groups, one of them of two experts."""
    return LocalEnsemble(toys([NESTED, LONG, LONG]))


def step(local: LocalEnsemble, decoder: Decoder, order: list[str]) -> tuple[dict[str, list[Outcome]], list[str]]:
    """One round in which the experts answer in this order; who had something to be done ahead."""
    calls, outcomes, worked = decoder.calls(), dict[str, list[Outcome]](), []
    for name in [name for name in order if name in calls]:
        outcomes |= local.run({name: calls[name]})
        if len(outcomes) < len(calls) and (work := decoder.ahead(name, outcomes[name], Stopwatch())) is not None:
            thread = Thread(target=work)
            thread.start()
            thread.join()
            worked.append(name)
    return outcomes, worked


@pytest.mark.parametrize("order", [["e0", "e1", "e2"], ["e2", "e1", "e0"], ["e1", "e0", "e2"]])
@pytest.mark.parametrize("unit", [Unit.BYTE, Unit.UNION])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=0.8, top_k=5)], ids=["greedy", "drawn"])
def test_the_text_is_the_same(local: LocalEnsemble, order: list[str], unit: Unit, sampling: Sampling) -> None:
    request = DecodeRequest(sampling=sampling, seed=3, max_bytes=60, unit=unit)
    plain = local.decoder("cab", MIXTURE, request)
    "".join(local.pieces(plain))
    decoder, ahead = local.decoder("cab", MIXTURE, request), set[str]()
    while not decoder.finished:
        outcomes, worked = step(local, decoder, order)
        ahead.update(worked)
        decoder.resume(outcomes)
    assert decoder.text == plain.text
    assert decoder.log_probs == plain.log_probs
    assert decoder.finish == plain.finish
    # Whoever makes a group complete, and not all experts. The union's law is one of all of them.
    first = "e0" if order[-1] != "e0" else order[1]
    assert first in ahead if unit is Unit.BYTE else not ahead


def damage(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[list[Outcome]], list[Outcome]]:
    return lambda outcomes: [change(o) if isinstance(o, torch.Tensor) and len(o) else o for o in outcomes]


@pytest.mark.parametrize(
    "wrong", [damage(lambda rows: torch.full_like(rows, torch.nan)), damage(lambda rows: rows[:, :-1])]
)
def test_rows_that_are_no_law_are_met_by_resume(
    local: LocalEnsemble, wrong: Callable[[list[Outcome]], list[Outcome]]
) -> None:
    request = DecodeRequest(sampling=GREEDY, max_bytes=30)
    decoder = local.decoder("cab", MIXTURE, request)
    calls = decoder.calls()
    outcomes = local.run(calls)
    outcomes["e0"] = wrong(outcomes["e0"])
    work = decoder.ahead("e0", outcomes["e0"], Stopwatch())
    assert work is not None
    work()
    with pytest.raises(BadLogits) as caught:
        decoder.resume(outcomes)
    assert list(caught.value.experts) == ["e0"]
    # Its successor is asked for the rows again, and nothing was made of the bad ones.
    decoder.lost("e0")
    while calls := decoder.calls():
        decoder.resume(local.run(calls))
    assert decoder.text == local.generate("cab", MIXTURE, request)[0].encode()


def test_a_refusal_is_left_to_resume(local: LocalEnsemble) -> None:
    decoder = local.decoder("cab", MIXTURE, DecodeRequest(sampling=GREEDY, max_bytes=30))
    outcomes = local.run(decoder.calls())
    refused = OpError(OpErrorKind.UNKNOWN_SEQUENCE, "no such sequence")
    assert decoder.ahead("e0", [*outcomes["e0"][:-1], refused], Stopwatch()) is None


def test_a_slower_expert_that_is_lost_leaves_what_was_made(local: LocalEnsemble) -> None:
    request = DecodeRequest(sampling=GREEDY, max_bytes=30)
    decoder = local.decoder("cab", MIXTURE, request)
    outcomes = local.run(decoder.calls())
    work = decoder.ahead("e0", outcomes["e0"], Stopwatch())
    assert work is not None
    work()
    decoder.resume({"e0": outcomes["e0"]})
    while calls := decoder.calls():
        decoder.resume(local.run(calls))
    assert decoder.text == local.generate("cab", MIXTURE, request)[0].encode()
