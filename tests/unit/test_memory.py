"""Large arrays get memory that was used before, and only once nothing refers to it any more."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from token_swarm import memory

WIDTH = memory.LEAST_BYTES // 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_memory_is_used_again_once_it_is_free(dtype: torch.dtype) -> None:
    first = memory.empty((3, WIDTH), dtype)
    assert (first.shape, first.dtype, first.data_ptr() % 64) == ((3, WIDTH), dtype, 0)
    address = first.data_ptr()
    del first
    assert memory.empty((3, WIDTH), dtype).data_ptr() == address


@pytest.mark.parametrize("view", [lambda whole: whole[1], lambda whole: whole[1].numpy(), lambda whole: whole.view(-1)])
def test_a_view_holds_on_to_it(view) -> None:
    whole = memory.empty((2, WIDTH), torch.float32)
    whole.fill_(1.0)
    address, part = whole.data_ptr(), view(whole)
    del whole
    other = memory.empty((2, WIDTH), torch.float32)
    assert other.data_ptr() != address
    other.fill_(2.0)
    assert (part == 1.0).all()


@pytest.mark.parametrize(
    "view",
    [
        lambda whole: whole[1],
        lambda whole: whole.reshape(-1).view(np.uint32).view(np.float32),
        lambda whole: torch.from_numpy(whole)[1],
        lambda whole: torch.from_numpy(whole).numpy()[1:][0][:7],
    ],
)
def test_a_view_of_a_numpy_array_holds_on_to_it(view) -> None:
    whole = memory.empty((2, WIDTH), torch.float32).numpy()
    whole[:] = 1.0
    address, part = whole.ctypes.data, view(whole)
    del whole
    other = memory.empty((2, WIDTH), torch.float32).numpy()
    assert other.ctypes.data != address
    other[:] = 2.0
    assert (part == 1.0).all()
    del part
    assert memory.empty((2, WIDTH), torch.float32).numpy().ctypes.data == address


def test_numpy_and_torch_share_what_is_free() -> None:
    first = memory.empty((3, WIDTH), torch.float64).numpy()
    assert (first.shape, first.dtype, first.ctypes.data % 64) == ((3, WIDTH), np.float64, 0)
    address = first.ctypes.data
    del first
    assert memory.empty((3, WIDTH), torch.float64).data_ptr() == address
    assert memory.empty((3, 5), torch.float32).numpy().shape == (3, 5)


def test_arrays_that_live_never_share_memory_whatever_thread_asks() -> None:
    failures: list[str] = []

    def work(number: int) -> None:
        for turn in range(200):
            held = [memory.empty((1, WIDTH + 8), torch.float32) for _ in range(3)]
            for index, tensor in enumerate(held):
                tensor.fill_(number * 1000 + turn * 3 + index)
            if any((tensor != number * 1000 + turn * 3 + index).any() for index, tensor in enumerate(held)):
                failures.append(f"thread {number}, turn {turn}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_smaller_array_may_take_the_place_of_a_larger_one() -> None:
    first = memory.empty((2 * WIDTH,), torch.float32)
    address = first.data_ptr()
    del first
    assert memory.empty((2 * WIDTH - 100,), torch.float32).data_ptr() == address


def test_what_is_kept_is_bounded() -> None:
    size = memory.LEAST_BYTES * 4
    held = [memory.empty((size,), torch.uint8) for _ in range(3 * memory.KEPT_BYTES // size)]
    del held
    assert len(memory._kept[size]) == memory.KEPT_BYTES // size


@pytest.mark.parametrize("size", [memory.LEAST_BYTES - 1, memory.MOST_BYTES + 1])
def test_small_arrays_and_very_large_ones_are_left_to_the_allocator(size: int) -> None:
    before = {capacity: len(kept) for capacity, kept in memory._kept.items()}
    tensor = memory.empty((size,), torch.uint8)
    assert tensor.shape == (size,)
    del tensor
    assert {capacity: len(kept) for capacity, kept in memory._kept.items()} == before
