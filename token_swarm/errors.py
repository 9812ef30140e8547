"""Exceptions that callers of the library may want to tell apart."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence


def _shown(value: object) -> str:
    """A value from outside in one line that it cannot make long."""
    shown = repr(value)
    # A path is only of use as a whole.
    return shown if len(shown) <= 200 else f"{shown[:160]}... ({len(shown)} characters)"


class BadParameter(ValueError):
    """A value from outside that cannot be used.

    `field` is the path of the field as the caller wrote it (`sampling.top_p`), `value` what it holds and
    `allowed` says in words what it may hold.
    """

    def __init__(self, field: str, value: object, allowed: str) -> None:
        super().__init__(f"{field}: {_shown(value)} is not allowed; it must be {allowed}")
        self.field = field
        self.value = value
        self.allowed = allowed


class UnknownName(LookupError):
    """A name that names nothing. `kind` says what was looked for ("expert", "particle")."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        names = ", ".join(sorted(known)) or "none"
        super().__init__(f"there is no {kind} named {_shown(name)}; known: {names}")
        self.kind = kind
        self.name = name


class FailedPrecondition(RuntimeError):
    """Well-formed, but not against this state: such as a particle tuned for another vocabulary."""


class PluginError(FailedPrecondition):
    """An entry point of another distribution that cannot be used. The message is one line."""

    def __init__(self, group: str, entry: str, problem: str) -> None:
        """entry: as the distribution wrote it, `name = module:attribute`."""
        super().__init__(f"entry point {entry} of {group}: {problem}")


class FingerprintMismatch(FailedPrecondition):
    """A particle that was learned for another expert than the running one of the same name."""

    def __init__(self, particle: str, expert: str, wanted: str, running: str) -> None:
        super().__init__(
            f"particle {particle!r} was made for an expert {expert!r} with fingerprint {wanted[:12]}, "
            f"but the running one has {running[:12]}"
        )


class PromptTooLong(BadParameter):
    """A prompt that does not fit an expert's context."""

    def __init__(self, expert: str, length: int, limit: int) -> None:
        super().__init__(
            "prompt", f"{length} tokens of expert {expert}", f"shorter than its context of {limit} tokens"
        )


class TextTooLong(BadParameter):
    """A text to score that does not fit an expert's context. length: its tokens, those of its prompt among them."""

    def __init__(self, expert: str, length: int, limit: int) -> None:
        super().__init__(
            "text",
            f"{length} tokens of expert {expert}, those of its prompt among them",
            f"at most its context of {limit} tokens",
        )


class TextChanged(BadParameter):
    """A text that an expert's tokenizer does not reproduce: it has no probability under that expert."""

    def __init__(self, text: str, written: bytes) -> None:
        """text: what was tokenized; written: what its tokens write."""
        asked = text.encode()
        shared = next((i for i, (one, other) in enumerate(zip(asked, written, strict=False)) if one != other), None)
        at = min(len(asked), len(written)) if shared is None else shared
        start = len(asked[:at].decode(errors="ignore"))
        here = text[start : start + 2]
        # By their code points: two forms of one character look alike.
        points = " ".join(f"U+{ord(char):04X}" for char in here)
        form = next((form for form in ("NFC", "NFKC") if unicodedata.normalize(form, text).encode() == written), None)
        why = f", which normalises it to {form}" if form else ""
        super().__init__(
            "text",
            f"{here} ({points}) at character {start}",
            f"text that the expert's tokenizer reproduces{why}",
        )


class ExpertFault(RuntimeError):
    """An expert broke its contract: rows that are missing, operations that it keeps refusing."""

    def __init__(self, expert: str, message: str) -> None:
        super().__init__(f"expert {expert!r}: {message}")
        self.expert = expert


class BadLogits(ExpertFault):
    """Logits that are no law: NaN, +inf, or a row of the wrong width. `experts`: whose they are; `reason`: in what."""

    def __init__(
        self,
        experts: Sequence[str],
        message: str = "logits hold NaN or +inf, or no allowed token has a finite logit",
    ) -> None:
        super().__init__("+".join(experts), message)
        self.experts = tuple(experts)
        self.reason = message


class NoContinuation(FailedPrecondition):
    """A text that has no continuation under a mixture of experts none of which is at fault.

    Every expert has likely continuations, but none that the others give any probability. `experts`: their names.
    """

    def __init__(self, experts: Iterable[str]) -> None:
        names = "+".join(experts)
        super().__init__(
            f"experts {names}: no continuation of the text is left to which all of them give a probability above 0; "
            "use weights nearer to 1, higher expert temperatures, or the linear rule"
        )


class BadHistory(FailedPrecondition):
    """A text after which an expert's logits are no distribution, although it answers other texts well.

    Asking again gives the same: the text, the expert or its dtype has to be another one. `expert`: its name.
    """

    def __init__(self, expert: str, message: str) -> None:
        super().__init__(
            f"expert {expert!r} cannot go on with this text: {message}, again when it read the text anew; it answers "
            "other texts, so leave it out of the mixture or load it with another dtype"
        )
        self.expert = expert
