"""Reads the score out of what a judging model replied."""

from __future__ import annotations

import re

LOWEST, HIGHEST = 1, 10

_CLOSING = r"[*_`\"')\]}]{0,4}"
_OPENING = r"[\s*_`\"'([{]{0,6}"
_VALUE = (
    # A whole number, with or without its scale of 10 ...
    rf"(?<![0-9.,/-])([0-9]+){_CLOSING}(?:\s*(?:/|\bout\s+of\b)\s*\*{{0,2}}10)?"
    # ... that is no part of a longer one, a decimal, a date, a fraction of something else or a percentage.
    r"(?![0-9]|[.,][0-9]|\s*%|\s*(?:/|out\s+of|of)\s*\*{0,2}[0-9])"
)
_SCALE = r"(?:on\s+a\s+scale\s+(?:of|from)\s+|out\s+of\s+|from\s+)?(?:1\s*(?:-|–|to)\s*)?10"
_LABEL = (
    rf"(?:\b(?:score|rating|grade|mark)\b{_CLOSING}(?:\s*[(\[]?{_SCALE}[)\]]?(?=\s*(?:[*_:=]|is\b)))?"
    r"|\bon\s+a\s+scale\s+(?:of|from)\s+1\s*(?:-|–|to)\s*10\b)"
)
_GIVES = (
    r"(?:\bI(?:\s+would|\s+will|'d|’d|'ll|’ll)?\s+(?:rate|give|score|grade|award|assign)\b|\b(?:deserves|merits|is\s+worth)\b)"
    r"(?:\s+(?:this|that|it|the|assistant's|assistant|answer|response|reply|text|output|score|rating|a|an|as|at|of))*"
)
# From the most to the least explicit: the first kind that is there decides, and its last one counts.
_FORMS = tuple(
    re.compile(form, re.IGNORECASE)
    for form in (
        rf"\[\[\s*{_VALUE}",
        rf"{_LABEL}{_CLOSING}\s*(?:(?:is|of|would\s+be|:|=|-(?=\s)|–|—|→)\s*)?{_CLOSING}{_OPENING}{_VALUE}",
        r"(?<![0-9.,/-])([0-9]+)[*_`]{0,3}\s*(?:/|\bout\s+of\b)\s*\*{0,2}10(?![0-9/]|[.,][0-9])",
        rf"{_GIVES}\s*:?{_OPENING}{_VALUE}",
    )
)
_LONE = re.compile(rf"^{_OPENING}#*\s*{_VALUE}{_CLOSING}[.!]?{_CLOSING}$")
_THOUGHT = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL | re.IGNORECASE)


def parse_score(reply: str) -> int | None:
    """The whole number from 1 to 10 that `reply` gives as its score; None when it gives none, or another kind.

    Understood are, the more explicit form before the others: "[[7]]"; "Score: 7", "Rating: **7**/10"; "7/10", "7 out of
    10"; "I'd give this a 7"; and a first or last line that is nothing but a number. Of several of one form the last
    counts. A number that is none of these is no score, such as the year in a chatty answer. What a model thinks aloud
    (`<think>`) is left out.
    """
    said = _THOUGHT.sub("", reply).strip()
    found = next((found for form in _FORMS if (found := form.findall(said))), None)
    if found is None:
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        found = [match[1] for line in (*lines[:1], *lines[-1:]) if (match := _LONE.match(line))]
    score = int(found[-1]) if found else 0
    return score if LOWEST <= score <= HIGHEST else None
