"""The combination kernels beside torch eager and beside what memory allows: `python -m bench.kernels --help`.

One thread. Every pair is measured interleaved in the same run; figures are medians. The floor of a mix is the time to
read its logits once at the read bandwidth measured in the same run. On a GPU it is the time to read them and to write
the mixture, at the bandwidth of a copy, and stands beside the time on the device: that of a recorded graph of calls on
tables that do not fit its cache together, without what a call costs the processor that makes it.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
from rich.console import Console
from rich.table import Table

from bench.common import print_facts, print_json
from token_swarm.kernels import STRIDE, dispatch, eager
from token_swarm.particle import Rule

EXPERTS = 3
WIDTHS = (50_257, 152_064, 262_144)
ROWS = {"cpu": (1, 8), "cuda": (1, 8, 64, 256)}
"""Rows of a call: a GPU needs more of them to be busy."""


@dataclass(frozen=True)
class Row:
    """One comparison. Times in microseconds, rate in the unit of `rate_unit`. device_us: without what a call costs."""

    kernel: str
    case: str
    eager_us: float
    ours_us: float
    floor_us: float | None = None
    device_us: float | None = None
    rate: float | None = None
    rate_unit: str = ""

    @property
    def speedup(self) -> float:
        """How many times faster than torch eager."""
        return self.eager_us / self.ours_us

    @property
    def share(self) -> float | None:
        """Of the bandwidth that was measured: 1 is as fast as the floor."""
        return None if self.floor_us is None else self.floor_us / (self.device_us or self.ours_us)


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


def on_device(calls: Sequence[Callable[[], object]], seconds: float) -> float:
    """Median microseconds that one of `calls` takes a GPU: all of them are recorded as one graph, which is replayed."""
    graph = torch.cuda.CUDAGraph()
    for call in calls:
        call()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times: list[float] = []
    graph.replay()
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(times) < 5:
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / len(calls))
    return statistics.median(times)


def read_bandwidth(device: torch.device, seconds: float, synchronise: Callable[[], None], megabytes: int) -> float:
    """Bytes per second of summing a table of that size."""
    table = torch.ones(megabytes * 2**18, device=device)
    (microseconds,) = interleaved([lambda: table.sum()], seconds, synchronise)
    return table.numel() * 4 / (microseconds * 1e-6)


def copy_bandwidth(device: torch.device, seconds: float, megabytes: int) -> float:
    """Bytes per second, read and written, of copying a table of that size on a GPU."""
    table = torch.ones(megabytes * 2**18, device=device)
    other = torch.empty_like(table)
    # A kernel that reads and writes; what a graph copies by itself is slower.
    return 2 * table.numel() * 4 / (on_device([lambda: torch.neg(table, out=other)], seconds) * 1e-6)


def tables_of(device: torch.device, dtype: torch.dtype, rows: int, width: int, size: int) -> list[list[torch.Tensor]]:
    """Random logits of all experts: one set; on a GPU as many as do not fit its cache, `size` bytes each."""
    random = torch.Generator(device).manual_seed(width)
    sets = 1
    if device.type == "cuda":
        sets = min(256, 1 + 3 * torch.cuda.get_device_properties(device).L2_cache_size // size)

    def logits() -> torch.Tensor:
        return (torch.randn(rows, width, generator=random, device=device) * 4).to(dtype)

    return [[logits() for _ in range(EXPERTS)] for _ in range(sets)]


def mix_rows(device: torch.device, seconds: float, synchronise: Callable[[], None], bandwidth: float) -> list[Row]:
    """`mix` over the sizes of real vocabularies. `bandwidth`: what the floor is reckoned with."""
    cases = itertools.product(Rule, (torch.float32, torch.bfloat16), ROWS[device.type], WIDTHS)
    return [mix_row(device, seconds, synchronise, bandwidth, *case) for case in cases]


def mix_row(
    device: torch.device,
    seconds: float,
    synchronise: Callable[[], None],
    bandwidth: float,
    rule: Rule,
    dtype: torch.dtype,
    count: int,
    width: int,
) -> Row:
    """One size of `mix`."""
    size = EXPERTS * count * width * dtype.itemsize
    sets = tables_of(device, dtype, count, width, size)
    weights = torch.full((count, EXPERTS), 1 / EXPERTS, dtype=torch.float64, device=device)
    heat = torch.ones((count, EXPERTS), dtype=torch.float64, device=device)
    allowed = torch.ones(width, dtype=torch.bool, device=device)
    allowed[:3] = False
    settings = (weights, heat, rule, allowed)
    slow, fast = interleaved(
        [lambda: eager.mix(sets[0], *settings), lambda: dispatch.mix(sets[0], *settings)], seconds, synchronise
    )
    on_cpu = device.type == "cpu"
    alone = None if on_cpu else on_device([partial(dispatch.mix, logits, *settings) for logits in sets], seconds)
    written = 0 if on_cpu else 4 * count * width
    return Row(
        f"mix {rule.value}",
        f"{str(dtype).removeprefix('torch.')}, B={count}, V={width:,}",
        slow,
        fast,
        floor_us=1e6 * (size + written) / bandwidth,
        device_us=alone,
        rate=size / (alone or fast) / 1e3,
        rate_unit="GB/s of logits",
    )


def prefix_rows(device: torch.device, seconds: float, synchronise: Callable[[], None]) -> list[Row]:
    """`prefix_mass` for the largest vocabulary."""
    rows = []
    for width in WIDTHS:
        random = torch.Generator().manual_seed(width)
        table = torch.softmax(torch.randn(1, width, generator=random) * 4, 1).to(device)
        # As the byte unit calls it.
        calls = [lambda k=k, t=table, w=width: k.prefix_mass(t, w, STRIDE) for k in (eager, dispatch)]  # type: ignore[misc]
        slow, fast = interleaved(
            calls,
            seconds,
            synchronise,
        )
        alone = on_device(calls[1:], seconds) if table.is_cuda else None
        rows.append(Row("prefix_mass", f"B=1, V={width:,}", slow, fast, device_us=alone))
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
    memory = read_bandwidth(device, options.seconds, synchronise, 256 if device.type == "cpu" else 4096)
    bandwidth = cached if device.type == "cpu" else copy_bandwidth(device, options.seconds, 4096)
    rows = [
        *mix_rows(device, options.seconds, synchronise, bandwidth),
        *prefix_rows(device, options.seconds, synchronise),
        *scoring_rows(device, options.seconds, synchronise),
    ]
    if options.json:
        shown = [{**asdict(row), "speedup": row.speedup, "share": row.share} for row in rows]
        rates = {"read from cache": cached / 1e9, "read from memory": memory / 1e9, "of the floor": bandwidth / 1e9}
        print_json("kernels", {"gb_s": rates, "rows": shown})
        return
    print_facts()
    title = (
        f"{dispatch.describe()}; reads {cached / 1e9:.1f} GB/s from cache (2 MB), {memory / 1e9:.1f} from memory; "
        f"floor at {bandwidth / 1e9:.1f}"
    )
    columns = ("kernel", "case", "eager us", "ours us", "speed-up", "on device us", "floor us", "of bandwidth", "rate")
    table = Table(*columns, title=title)
    for row in rows:
        alone = "" if row.device_us is None else f"{row.device_us:,.1f}"
        floor = "" if row.floor_us is None else f"{row.floor_us:,.{0 if row.floor_us > 20 else 1}f}"
        share = "" if row.share is None else f"{row.share:.0%}"
        rate = "" if row.rate is None else f"{row.rate:.2f} {row.rate_unit}"
        times = (f"{row.eager_us:,.0f}", f"{row.ours_us:,.0f}", f"{row.speedup:.1f}")
        table.add_row(row.kernel, row.case, *times, alone, floor, share, rate)
    Console(width=170).print(table)


if __name__ == "__main__":
    main()
