"""The log-probability of one text, through the death of any of its experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from token_swarm.decoding.ensemble import Ensemble
from token_swarm.decoding.score import Score, Scorer, scored_text
from token_swarm.decoding.windows import Window, encode_window, join_scores, plan_windows, token_lengths
from token_swarm.errors import BadLogits, BadParameter
from token_swarm.experts.contract import EncodedPrompt
from token_swarm_server.coordinator.expert.link import ExpertLink
from token_swarm_server.coordinator.mixing_pool import MixingPool
from token_swarm_server.coordinator.recovery import Members


async def score_text(
    ensemble: Ensemble,
    members: Members,
    text: str,
    allocate: Callable[[str], int],
    pool: MixingPool,
    stride: int | None = None,
) -> Score:
    """Log-probability of `text` under the experts of `members`, in windows (`decoding.windows`) where it is too long.

    An expert that comes back goes on where it was lost. Raises ExpertUnavailable, and what `plan_windows` and `Scorer`
    do.
    """
    if not text:
        raise BadParameter("text", text, "at least one byte")
    prompts = await members.encode()
    pieces = await members.each(lambda link: link.tokenize(scored_text(link.spec, prompts[link.name], text)[1]))
    lengths = {name: token_lengths(ensemble.specs[name], prompts[name], text, pieces[name]) for name in pieces}
    stride, windows = plan_windows(text.encode(), lengths, stride)
    if len(windows) == 1:
        return await _score_window(ensemble, members, prompts, pieces, text, allocate, pool)
    scores = []
    for window in windows:
        encoded = await members.each(partial(_encoded, prompts, text.encode(), window))
        own = text.encode()[window.start : window.stop].decode()
        before = {name: prompt for name, (prompt, _) in encoded.items()}
        tokens = {name: tokens for name, (_, tokens) in encoded.items()}
        scores.append(await _score_window(ensemble, members, before, tokens, own, allocate, pool))
    return join_scores(stride, windows, scores)


async def _encoded(
    prompts: Mapping[str, EncodedPrompt], text: bytes, window: Window, link: ExpertLink
) -> tuple[EncodedPrompt, tuple[int, ...]]:
    """What an expert reads before a window, and the window's tokens."""
    steps = encode_window(link.spec, prompts[link.name], text, window)
    answer = None
    while True:
        try:
            asked = steps.send(answer)
        except StopIteration as done:
            encoded: tuple[EncodedPrompt, tuple[int, ...]] = done.value
            return encoded
        answer = await (link.encode(asked.text) if asked.as_prompt else link.tokenize(asked.text))


async def _score_window(
    ensemble: Ensemble,
    members: Members,
    prompts: Mapping[str, EncodedPrompt],
    pieces: Mapping[str, Sequence[int]],
    text: str,
    allocate: Callable[[str], int],
    pool: MixingPool,
) -> Score:
    """Score what fits in one pass. pieces: canonical tokens of what `scored_text` says for each expert."""
    in_logs = False
    while True:
        scorer = Scorer(ensemble, members.mixture, prompts, text, pieces, allocate, in_logs=in_logs)
        fault: BadLogits | None = None
        try:
            while calls := scorer.calls():
                outcomes = await members.answers(members.ask(calls))
                await pool.aside(partial(scorer.resume, outcomes))
                await members.settle([name for name in calls if name not in outcomes])
            if not scorer.underflowed:
                return scorer.score
            in_logs = True
        except BadLogits as error:
            fault = error
        finally:
            members.release(scorer.close())
        if fault is not None:
            lost, _ = await members.examine(fault, 0)
            await members.settle(lost)
