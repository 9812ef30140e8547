"""Drafts: tokens that may come next, forwarded together with one that has come.

A forward of a few tokens takes hardly longer than one of a single token. Where the text goes on as drafted, the rows
that it needs are there already; where it does not, they are let go of. The laws that the text is chosen from are those
of the experts either way, so nothing has to be accepted by chance as where a smaller model drafts.
"""

from __future__ import annotations

from token_swarm.decoding.lanes import Tokens, common_prefix

LONGEST = 3
"""Tokens that are looked for at most."""


class PromptLookup:
    """Drafts what came after the last place where a history reads as it does at its end.

    The longest such end decides, of up to `LONGEST` tokens; after a single token that is there again, two tokens are
    drafted at most, because they are seldom right. Texts repeat names, quotations and code of their prompts, and
    themselves. (Prompt lookup decoding; `ngram` in vLLM.)
    """

    def __init__(self) -> None:
        self._last: dict[Tokens, int] = {}  # by tokens: where they ended last
        self._tokens: Tokens = ()
        self._read = 0  # tokens whose places are known

    def draft(self, history: Tokens, most: int) -> Tokens:
        """At most so many tokens, none where nothing is there again."""
        if most < 1:
            return ()
        self._follow(history)
        for size in range(min(LONGEST, len(history) - 1), 0, -1):
            end = self._last.get(history[-size:], 0)
            # Places of a history that was given up are still known.
            if size <= end < len(history) and history[end - size : end] == history[-size:]:
                return history[end : end + (min(most, 2) if size == 1 else most)]
        return ()

    def _follow(self, history: Tokens) -> None:
        """Note every place but the end, which would find itself."""
        self._read = min(self._read, common_prefix(self._tokens, history))
        self._tokens = history
        for end in range(self._read + 1, len(history)):
            for size in range(1, min(LONGEST, end) + 1):
                self._last[history[end - size : end]] = end
        self._read = max(self._read, len(history) - 1)
