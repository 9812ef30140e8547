"""The combination kernels beside torch eager and beside what memory allows: `python -m bench.kernels --help`.

One thread. Every pair is measured interleaved in the same run; figures are medians. The floor of a mix is the time to
read its logits once at the read bandwidth measured in the same run.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import torch
from rich.console import Console
from rich.table import Table

from bench.common import print_facts, print_json
from token_swarm.kernels import dispatch, eager
from token_swarm.particle import Rule

EXPERTS = 3
WIDTHS = (50_257, 152_064, 262_144)


@dataclass(frozen=True)
class Row:
    """One comparison. Times in microseconds, rate in the unit of `rate_unit`."""

    kernel: str
    case: str
    eager_us: float
    ours_us: float
    floor_us: float | None = None
    rate: float | None = None
    rate_unit: str = ""

    @property
    def speedup(self) -> float:
        """How many times faster than torch eager."""
        return self.eager_us / self.ours_us

    @property
    def share(self) -> float | None:
        """Of the read bandwidth that was measured: 1 is as fast as reading the logits once."""
        return None if self.floor_us is None else self.floor_us / self.ours_us


def interleaved(calls: Iterable[Callable[[], object]], seconds: float, synchronise: Callable[[], None]) -> list[float]:
    """Median microseconds of each call, taken in turns until `seconds` are over (at least 5 turns)."""
    calls = list(calls)
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 5:
        for call, own in zip(calls, times, strict=True):
            synchronise()
            started = time.perf_counter()
            call()
            synchronise()
            own.append(time.perf_counter() - started)
    return [1e6 * statistics.median(own) for own in times]


def read_bandwidth(device: torch.device, seconds: float, synchronise: Callable[[], None], megabytes: int) -> float:
    """Bytes per second of summing a table of that size."""
    table = torch.ones(megabytes * 2**18, device=device)
    (microseconds,) = interleaved([lambda: table.sum()], seconds, synchronise)
    return table.numel() * 4 / (microseconds * 1e-6)


def mix_rows(device: torch.device, seconds: float, synchronise: Callable[[], None], bandwidth: float) -> list[Row]:
    """`mix` over the sizes of real vocabularies."""
    rows = []
    for rule in Rule:
        for dtype in (torch.float32, torch.bfloat16):
            for count in (1, 8):
                for width in WIDTHS:
                    random = torch.Generator().manual_seed(width)
                    logits = [
                        (torch.randn(count, width, generator=random) * 4).to(device=device, dtype=dtype)
                        for _ in range(EXPERTS)
                    ]
                    weights = torch.full((count, EXPERTS), 1 / EXPERTS, dtype=torch.float64, device=device)
                    heat = torch.ones((count, EXPERTS), dtype=torch.float64, device=device)
                    allowed = torch.ones(width, dtype=torch.bool, device=device)
                    allowed[:3] = False
                    arguments = (logits, weights, heat, rule, allowed)
                    slow, fast = interleaved(
                        [lambda a=arguments: eager.mix(*a), lambda a=arguments: dispatch.mix(*a)],  # type: ignore[misc]
                        seconds,
                        synchronise,
                    )
                    size = EXPERTS * count * width * dtype.itemsize
                    rows.append(
                        Row(
                            f"mix {rule.value}",
                            f"{str(dtype).removeprefix('torch.')}, B={count}, V={width:,}",
                            slow,
                            fast,
                            floor_us=1e6 * size / bandwidth,
                            rate=size / fast / 1e3,
                            rate_unit="GB/s of logits",
                        )
                    )
    return rows


def prefix_rows(device: torch.device, seconds: float, synchronise: Callable[[], None]) -> list[Row]:
    """`prefix_mass` for the largest vocabulary."""
    rows = []
    for width in WIDTHS:
        random = torch.Generator().manual_seed(width)
        table = torch.softmax(torch.randn(1, width, generator=random) * 4, 1).to(device)
        order = torch.randperm(width, generator=random).to(device)
        slow, fast = interleaved(
            [lambda t=table, o=order: eager.prefix_mass(t, o), lambda t=table, o=order: dispatch.prefix_mass(t, o)],  # type: ignore[misc]
            seconds,
            synchronise,
        )
        rows.append(Row("prefix_mass", f"B=1, V={width:,}", slow, fast))
    return rows


def scoring_rows(device: torch.device, seconds: float, synchronise: Callable[[], None]) -> list[Row]:
    """Scoring 20 particles over a cache; rates in particle-positions."""
    rows = []
    particles = 20
    for experts in (2, 6):
        random = torch.Generator().manual_seed(experts)
        weights = torch.rand(particles, experts, generator=random, dtype=torch.float64)
        weights = (weights / weights.sum(1, keepdim=True)).to(device)
        positions = 300_000  # a rate: the first call after others have used the caches takes 0.2 ms to get going
        masses = torch.rand(experts, positions, generator=random).to(device)
        offsets = torch.arange(0, positions + 1, 500).to(device)
        slow, fast = interleaved(
            [
                lambda m=masses, w=weights, o=offsets: eager.score_linear(m, w, o),  # type: ignore[misc]
                lambda m=masses, w=weights, o=offsets: dispatch.score_linear(m, w, o),  # type: ignore[misc]
            ],
            seconds,
            synchronise,
        )
        rate = particles * positions / fast / 1e3
        case = f"{experts} experts, {particles} particles, {positions:,} positions"
        rows.append(Row("score linear", case, slow, fast, rate=rate, rate_unit="G particle-positions/s"))
        positions = 4_000
        laws = torch.log_softmax(torch.randn(positions, experts, 257, generator=random) * 4, 2).to(device)
        targets = torch.randint(0, 257, (positions,), generator=random).to(device)
        offsets = torch.arange(0, positions + 1, 500).to(device)
        slow, fast = interleaved(
            [
                lambda a=(laws, targets, weights, offsets): eager.score_log_linear(*a),  # type: ignore[misc]
                lambda a=(laws, targets, weights, offsets): dispatch.score_log_linear(*a),  # type: ignore[misc]
            ],
            seconds,
            synchronise,
        )
        rate = particles * positions / fast
        case = f"{experts} experts, {particles} particles, {positions:,} positions x 257"
        rows.append(Row("score log-linear", case, slow, fast, rate=rate, rate_unit="M particle-positions/s"))
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=0.5, help="per comparison")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(options.device)
    synchronise = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    cached = read_bandwidth(device, options.seconds, synchronise, 2)
    memory = read_bandwidth(device, options.seconds, synchronise, 256)
    rows = [
        *mix_rows(device, options.seconds, synchronise, cached if device.type == "cpu" else memory),
        *prefix_rows(device, options.seconds, synchronise),
        *scoring_rows(device, options.seconds, synchronise),
    ]
    if options.json:
        shown = [{**asdict(row), "speedup": row.speedup, "share": row.share} for row in rows]
        print_json("kernels", {"read_gb_s": {"2 MB": cached / 1e9, "256 MB": memory / 1e9}, "rows": shown})
        return
    print_facts()
    title = f"{dispatch.describe()}; reads {cached / 1e9:.1f} GB/s from cache (2 MB), {memory / 1e9:.1f} from memory"
    table = Table("kernel", "case", "eager us", "ours us", "speed-up", "floor us", "of bandwidth", "rate", title=title)
    for row in rows:
        floor = "" if row.floor_us is None else f"{row.floor_us:,.0f}"
        share = "" if row.share is None else f"{row.share:.0%}"
        rate = "" if row.rate is None else f"{row.rate:.2f} {row.rate_unit}"
        times = (f"{row.eager_us:,.0f}", f"{row.ours_us:,.0f}", f"{row.speedup:.1f}")
        table.add_row(row.kernel, row.case, *times, floor, share, rate)
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
