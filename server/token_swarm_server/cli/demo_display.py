"""What `token-swarm demo` shows: texts as they are written, who carried the ensemble's, and a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from token_swarm_server.cli.demo import Demo, Word

ENSEMBLE = "the ensemble"
_STYLES = ("cyan", "yellow", "magenta", "green", "blue", "red")


class _Passage:
    """A text on the screen: called with each piece of it, and at last coloured."""

    def __init__(self, title: Text, styles: dict[str, str]) -> None:
        self.written = Text()
        self.shown = Group(title, self.written)
        self._styles = styles

    def __call__(self, piece: str) -> None:
        self.written.append(piece)

    def colour(self, words: Sequence[Word]) -> None:
        """Give every word the colour of the expert that carried it."""
        at = 0
        for word in words:
            if word.carried is not None:
                self.written.stylize(self._styles[word.carried], at, at + len(word.text))
            at += len(word.text)


class DemoDisplay:
    """The screen of the demo. `quiet`: shows nothing."""

    def __init__(self, names: Sequence[str], *, quiet: bool = False) -> None:
        self._console = Console(quiet=quiet, highlight=False)
        self._styles = {name: _STYLES[at % len(_STYLES)] for at, name in enumerate(names)}

    def show_prompt(self, prompt: str, *, chat: bool) -> None:
        """What is asked."""
        self._console.print(Text.assemble(("question: " if chat else "to continue: ", "bold"), prompt))
        self._console.print()

    @contextmanager
    def text(self, name: str) -> Iterator[_Passage]:
        """A text being written by the expert `name`; "" is the ensemble."""
        title = Text(f"{name} alone" if name else ENSEMBLE, f"bold {self._styles.get(name, '')}".strip())
        passage = _Passage(title, self._styles)
        with Live(passage.shown, console=self._console, vertical_overflow="visible"):
            yield passage
        # On a terminal the live display ends its last line, elsewhere it does not.
        self._console.line(1 if self._console.is_terminal else 2)

    def show_legend(self) -> None:
        """What the colours of the ensemble's text mean."""
        if self._console.is_terminal and not self._console.no_color:
            colours = [(f"{name} ", style) for name, style in self._styles.items()]
            self._console.print(
                Text.assemble("colours: who thought the word clearly more probable: ", *colours)
            )
            self._console.print()

    @contextmanager
    def busy(self, what: str) -> Iterator[None]:
        """Something that takes seconds and shows nothing."""
        with self._console.status(what):
            yield

    def show_table(self, found: Demo) -> None:
        """Share, speed and bits per byte of each expert and of the ensemble."""
        carried = Counter(word.carried for word in found.words)
        shares = {use.expert: use.share for use in found.ensemble.finish.experts}
        table = Table(box=None, pad_edge=False)
        table.add_column("")
        for heading in ("weight", "share", "carried", "ms/byte", *(f"bits/byte of {title}" for title in found.scores)):
            table.add_column(heading, justify="right", min_width=7)
        for name, alone in found.alone.items():
            table.add_row(
                Text(name, self._styles[name]),
                f"{found.weights.get(name, 1 / len(found.alone)):g}",
                f"{shares.get(name, 0):.0%}",
                f"{carried[name] / max(1, len(found.words)):.0%}",
                f"{alone.ms_per_byte:.0f}",
                *(f"{bits[name]:.3f}" for bits in found.scores.values()),
            )
        best = [f"{bits['']:.3f}" for bits in found.scores.values()]
        table.add_row(Text(ENSEMBLE, "bold"), "", "", "", f"{found.ensemble.ms_per_byte:.0f}", *best)
        self._console.print(table)
        self._console.print(
            "\ncarried: words that the expert thought clearly more probable than the other did.\n"
            "bits/byte: how well each predicts a text that none has read; lower is better.\n"
            "Next:  token-swarm serve"
        )
