"""Tables for people."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from token_swarm.v1 import swarm_pb2
from token_swarm_server.cli.client import enum_name

_STATES = swarm_pb2.ExpertState.DESCRIPTOR
_REASONS = swarm_pb2.FinishReason.DESCRIPTOR
_UNITS = swarm_pb2.Unit.DESCRIPTOR
_RULES = swarm_pb2.Rule.DESCRIPTOR


def plain_table(first: str, *others: str, texts: Collection[str] = ()) -> Table:
    """A table that fits 80 columns: without frames, and what is too long goes on in the next line.

    Columns are numbers, which are never broken, but for `first` and those in `texts`.
    """
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column(first, overflow="fold")
    for name in others:
        if name in texts:
            table.add_column(name, overflow="fold")
        else:
            table.add_column(name, justify="right", no_wrap=True)
    return table


def experts_table(experts: Collection[swarm_pb2.ExpertInfo]) -> Table:
    """What runs; experts of one group share their tokens. tokens: of the vocabulary; context: the most in a text."""
    ready = all(each.state == swarm_pb2.EXPERT_STATE_READY for each in experts)
    heads = ("expert", "model", "group", "tokens", "context", "dtype", *(() if ready else ("state",)))
    table = plain_table(*heads, texts=("model", "state"))
    for each in experts:
        table.add_row(
            each.name,
            each.architecture,
            str(each.group),
            f"{each.vocabulary_size:,}",
            f"{each.max_context:,}",
            each.dtype,
            *(() if ready else (enum_name(_STATES, each.state),)),
        )
    return table


def finish_line(finish: swarm_pb2.Finish) -> str:
    """How a text ended, and where its time went."""
    timings = finish.timings
    parts = [f"{finish.bytes} bytes in {timings.total_seconds:.2f} s"]
    if timings.HasField("first_byte_seconds"):
        parts.append(f"first after {timings.first_byte_seconds:.2f} s")
    parts.append(f"unit {enum_name(_UNITS, finish.unit)}")
    parts.append(f"finish {enum_name(_REASONS, finish.reason)}")
    parts.append(f"seed {finish.seed}" if finish.HasField("seed") else "greedy")
    parts.append(f"certificate {finish.certificate:.2g}")
    return ", ".join(parts)


def finish_table(finish: swarm_pb2.Finish) -> Table:
    """What each expert did for a text, and how long a byte and one of its tokens took."""
    seconds = finish.timings.total_seconds
    table = plain_table("expert", "share", "tokens", "forwards", "wasted", "drafts", "ms/byte", "ms/token")
    for use in finish.experts:
        table.add_row(
            use.expert,
            f"{use.share:.1%}",
            str(use.tokens),
            str(use.forwards),
            str(use.wasted_forwards),
            f"{use.accepted_draft_tokens}/{use.draft_tokens}" if use.draft_tokens else "-",
            _milliseconds(seconds, finish.bytes),
            _milliseconds(seconds, use.tokens),
        )
    return table


def _milliseconds(seconds: float, count: int) -> str:
    return f"{1000 * seconds / count:.1f}" if count else "-"


def score_table(report: Mapping[str, Any]) -> Table:
    """Bits per byte of a text under the ensemble and under each expert."""
    table = plain_table("model", "bits/byte", "of its tokens", "tokens")
    table.add_row("ensemble", f"{report['bits_per_byte']['ensemble']:.4f}", "", "")
    for name, bits in report["bits_per_byte"]["experts"].items():
        own = report["token_level"]["experts"][name]
        table.add_row(name, f"{bits:.4f}", f"{own:.4f}", str(report["tokens"][name]))
    return table


def particles_table(particles: Iterable[swarm_pb2.ParticleInfo]) -> Table:
    """Named mixtures."""
    table = plain_table("particle", "rule", "weights", "utility", "dev", "test", texts=("rule", "weights", "utility"))
    for each in particles:
        weights = "\n".join(f"{weight.expert}={weight.weight:.4g}" for weight in each.mixture.weights)
        table.add_row(
            each.name,
            enum_name(_RULES, each.mixture.rule).replace("_", "-"),
            weights,
            each.utility or "-",
            f"{each.dev_score:.4g}" if each.HasField("dev_score") else "-",
            f"{each.test_score:.4g}" if each.HasField("test_score") else "-",
        )
    return table
