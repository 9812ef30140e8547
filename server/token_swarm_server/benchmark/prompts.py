"""Prompts of an exact length: English prose that no model has read, from different places of one passage."""

from __future__ import annotations

import random

from token_swarm.errors import BadParameter

PASSAGE = """\
The keeper of the northern light wrote in her log that the sea had been calm for nine days, and that on the tenth the \
birds left. She did not say which birds. Her successor, a retired surveyor with a habit of measuring everything \
twice, copied the entry into a book of his own and added the height of the tide, the colour of the sky at six in the \
evening, and the price of lamp oil in the harbour. Between them they filled forty volumes in thirty years, and it is \
from these that we know how the channel moved.

It moved slowly at first. A bank of gravel that the old charts show east of the rocks had crept a boat's length \
towards the shore by the end of the first decade, and fishermen who had learned the passage from their fathers began \
to scrape their keels where there had been deep water. The surveyor suspected the new breakwater. He walked its \
length at low tide with a rope marked in fathoms, counted the stones that had fallen on either side, and found that \
the current now ran twice as fast through the gap as it did around it. Sand that used to settle in the bay was being \
carried past it.

Nobody in the harbour wanted to hear this. The breakwater had cost more than the church, the school and the \
lighthouse together, and the council that had paid for it was still in office. So the surveyor did what he had always \
done: he went on measuring. Every spring he sounded the channel from a small boat, at the same hundred and twelve \
points, on the same day of the month, with the same lead. When the lead was lost he weighed three others until he \
found its equal. He drew the results as lines on thin paper, so that one year could be laid over another and held \
against a window.

When the coaster struck the bank in the autumn gales, eleven years after the first sounding, the inquiry lasted two \
days. On the first, four captains swore that the chart was right and that the helmsman had been drunk. On the second, \
the surveyor's daughter carried in a portfolio and pinned eleven sheets of paper to the courtroom window, one on top \
of the other. The afternoon sun was behind them. Anybody could see the dark line of the gravel walk, sheet by sheet, \
from the edge of the page into the middle of the channel, and stop exactly where the ship lay.

The chart was redrawn that winter, and the gap in the breakwater was widened the year after. What remains is the \
habit. There are people in the village who could not name the captain or the ship, but who still write down the tide \
on the first of every month, in ink, beside the weather and the price of oil.
"""


def prompt(length: int, seed: int, text: str = PASSAGE) -> str:
    """`length` bytes of `text`, from a place that `seed` chooses; where the text ends it begins again.

    A letter of several bytes that the cut would split is left out, so the prompt may be up to three bytes shorter.
    Raises BadParameter.
    """
    if length < 1:
        raise BadParameter("prompt_bytes", length, "an integer >= 1")
    starts = [0, *(at + 2 for at in range(len(text) - 2) if text[at : at + 2] in (". ", ".\n"))]
    if not text:
        raise BadParameter("text", text, "at least one character long")
    start = random.Random(seed).choice(starts)
    whole = (text[start:] + text).encode()
    while len(whole) < length:
        whole += text.encode()
    return whole[:length].decode(errors="ignore")
