"""The slot cache and the attention over it, against attention written out."""

from __future__ import annotations

import math

import pytest
import torch

from token_swarm import memory
from token_swarm.experts.transformers.packed_attention import ACTIVE, PackedBatch, Run, packed_attention
from token_swarm.experts.transformers.slot_cache import SlotCache

CPU = torch.device("cpu")
KV_HEADS, HEADS, DIM = 2, 4, 8


def feed(cache: SlotCache, runs: list[Run], keys: torch.Tensor, values: torch.Tensor):
    token = ACTIVE.set(PackedBatch(runs, CPU))
    try:
        return cache.update(keys, values, 0)
    finally:
        ACTIVE.reset(token)


def test_each_run_lands_in_its_slot():
    cache = SlotCache(4, 16)
    keys, values = torch.randn(1, KV_HEADS, 6, DIM), torch.randn(1, KV_HEADS, 6, 3)
    runs = [Run(2, 0, 3, 0), Run(0, 5, 1, 3), Run(3, 9, 2, 4)]
    stored_keys, stored_values = feed(cache, runs, keys, values)
    for run in runs:
        rows = slice(run.row, run.row + run.count)
        assert torch.equal(stored_keys[run.slot, :, run.start : run.stop], keys[0, :, rows])
        assert torch.equal(stored_values[run.slot, :, run.start : run.stop], values[0, :, rows])
    alone = torch.randn(1, KV_HEADS, 2, DIM)
    stored_keys, _ = feed(cache, [Run(2, 3, 2, 0)], alone, torch.randn(1, KV_HEADS, 2, 3))
    assert torch.equal(stored_keys[2, :, :5], torch.cat([keys[0, :, :3], alone[0]], dim=1))


def test_slots_are_reused_lowest_first():
    cache = SlotCache(3, 4)
    assert [cache.take() for _ in range(3)] == [0, 1, 2]
    assert not cache.has_free_slot
    with pytest.raises(IndexError):
        cache.take()
    cache.release(2)
    cache.release(0)
    assert [cache.take(), cache.take()] == [0, 2]
    cache.release_all()
    assert cache.take() == 0


@pytest.mark.skipif(memory.resident_bytes() == 0, reason="this system does not say what a process holds")
def test_free_slots_give_their_memory_back():
    cache, tokens = SlotCache(8, 2048), 2000
    for _ in range(2):
        slots = [cache.take() for _ in range(8)]
        empty = memory.resident_bytes()
        states = torch.randn(1, 64, tokens, 64)
        for slot in slots:
            feed(cache, [Run(slot, 0, tokens, 0)], states, states)
        size = 2 * states.nbytes
        full = memory.resident_bytes()
        assert full - empty > 5.5 * size
        for slot in slots:
            cache.release(slot)
        # All but two: those are taken again first.
        assert full - memory.resident_bytes() > 5 * size
        kept = cache.take()
        stored, _ = feed(cache, [Run(kept, tokens, 1, 0)], states[:, :, :1], states[:, :, :1])
        assert torch.equal(stored[kept, :, :tokens], states[0])
        cache.release(kept)
        cache.release_all()
    assert cache.nbytes_per_token == 2 * 64 * 64 * 4


def test_copy_takes_the_prefix_only():
    cache = SlotCache(2, 8)
    keys, values = torch.randn(1, KV_HEADS, 6, DIM), torch.randn(1, KV_HEADS, 6, DIM)
    stored, _ = feed(cache, [Run(0, 0, 6, 0)], keys, values)
    stored[1] = 7.0
    cache.copy(0, 1, 4)
    assert torch.equal(stored[1, :, :4], keys[0, :, :4])
    assert bool((stored[1, :, 4:] == 7.0).all())


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 1, 3, 8])
def test_attention_equals_attention_written_out(window, softcap):
    torch.manual_seed(0)
    cache = SlotCache(3, 16)
    history = {slot: torch.randn(2, KV_HEADS, 16, DIM) for slot in range(3)}
    for slot, (keys, values) in history.items():
        stored = feed(cache, [Run(slot, 0, 16, 0)], keys[None], values[None])
    runs = [Run(1, 0, 4, 0), Run(0, 9, 1, 4), Run(2, 6, 5, 5)]
    query = torch.randn(1, HEADS, 10, DIM)
    token = ACTIVE.set(PackedBatch(runs, CPU))
    try:
        output, _ = packed_attention(
            torch.nn.Identity(), query, *stored, None, scaling=0.3, sliding_window=window, softcap=softcap
        )
    finally:
        ACTIVE.reset(token)
    assert output.shape == (1, 10, HEADS, DIM)
    for run in runs:
        keys, values = history[run.slot]
        for offset in range(run.count):
            position = run.start + offset
            first = 0 if window is None else max(0, position - window + 1)
            for head in range(HEADS):
                group = head // (HEADS // KV_HEADS)
                scores = 0.3 * keys[group, first : position + 1] @ query[0, head, run.row + offset]
                if softcap is not None:
                    scores = torch.tensor([softcap * math.tanh(score / softcap) for score in scores.tolist()])
                expected = scores.softmax(0) @ values[group, first : position + 1]
                found = output[0, run.row + offset, head]
                torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
