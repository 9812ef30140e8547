"""Defaults of the byte unit, in a module of their own that imports next to nothing."""

from token_swarm.ranges import DRAFT_TOKENS

DEFAULT_EPSILON = 0.1
"""Chosen by `bench/epsilon.py`: about 1.15 forwards per own token, bits per byte within 0.1% of a far smaller one."""

DEFAULT_WINDOW = 8
"""Bytes; about two tokens."""

MOST_DRAFT_TOKENS = int(DRAFT_TOKENS.high)
"""Of a request. Rows of a step are few, and a guess of so many tokens is hardly ever right."""
