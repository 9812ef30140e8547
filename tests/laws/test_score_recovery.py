"""A score does not depend on how often its experts are lost on the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import pytest

from tests.laws.ensembles import DUPLICATES, LONG, toys
from token_swarm.decoding.forwards import Calls, Outcome
from token_swarm.decoding.in_process import LocalEnsemble
from token_swarm.decoding.score import Score
from token_swarm.errors import ExpertFault
from token_swarm.experts.contract import Close, Extend, Open, OpError, OpErrorKind
from token_swarm.experts.toy import ToyExpert
from token_swarm.particle import Mixture

TEXT = "abcab" * 60
MIXTURE = Mixture({"e0": 0.4, "e1": 0.6})

Run = Callable[[Calls, int], dict[str, list[Outcome]]]
"""What a round of operations gives, by its number."""


def experts() -> dict[str, ToyExpert]:
    return cast("dict[str, ToyExpert]", toys([DUPLICATES, LONG]))


def scored(local: LocalEnsemble, run: Run) -> tuple[Score, int]:
    """A score, and how many tokens were read for it."""
    scorer, read, number = local.scorer("a", TEXT, MIXTURE), 0, 0
    try:
        while calls := scorer.calls():
            read += sum(len(op.tokens) for ops in calls.values() for op in ops if isinstance(op, Open | Extend))
            scorer.resume(run(calls, number))
            number += 1
    finally:
        local.run(scorer.close())
    return scorer.score, read


def forgotten(toy: ToyExpert) -> None:
    """What a process that was started again knows of its sequences."""
    toy.step([Close(sequence) for sequence in list(toy._held)])


@pytest.mark.parametrize("at", range(6))
@pytest.mark.parametrize("name", ["e0", "e1"])
@pytest.mark.parametrize("answers", [False, True], ids=["it dies before it answers", "it dies unnoticed"])
def test_an_expert_that_comes_back_goes_on(name: str, at: int, answers: bool) -> None:
    held = experts()
    local = LocalEnsemble(held)
    expected, all_tokens = scored(local, lambda calls, _: local.run(calls))

    def run(calls: Calls, number: int) -> dict[str, list[Outcome]]:
        outcomes: dict[str, list[Outcome]] = local.run(calls)
        if number == at:
            forgotten(held[name])
            if not answers:
                outcomes.pop(name, None)
        return outcomes

    score, read = scored(local, run)
    assert score == expected
    # What was read before is read again once, and nothing of the other expert.
    assert read <= all_tokens + len(held[name].tokenize(TEXT)) + 2
    assert not any(toy._held for toy in held.values())


def test_an_expert_that_never_has_its_sequence_is_a_fault() -> None:
    held = experts()
    local = LocalEnsemble(held)
    refusal = OpError(OpErrorKind.UNKNOWN_SEQUENCE, "no sequence 1 is open")

    def run(calls: Calls, _: int) -> dict[str, list[Outcome]]:
        return {name: list(outcomes) if name == "e0" else [refusal] for name, outcomes in local.run(calls).items()}

    with pytest.raises(ExpertFault, match=r"e1.*no sequence 1"):
        scored(local, run)


def test_another_refusal_is_a_fault_and_frees_what_was_read() -> None:
    held = experts()
    local = LocalEnsemble(held)
    refusal = OpError(OpErrorKind.CONTEXT_FULL, "the context is full")

    def run(calls: Calls, number: int) -> dict[str, list[Outcome]]:
        outcomes: dict[str, list[Outcome]] = local.run(calls)
        return {name: [refusal] for name in outcomes} if number == 2 else outcomes

    with pytest.raises(ExpertFault, match="the context is full"):
        scored(local, run)
    assert not any(toy._held for toy in held.values())
