"""Threads that work ahead: everything comes, memory is bounded, failures arrive, nobody is left behind."""

import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lerobot_lam_diffusion.precompute.parallel import work_ahead


def counting(number: int):
    """A task's results: itself with each of its steps."""
    return ((number, step) for step in range(number % 4))


@given(st.lists(st.integers(0, 50), max_size=20), st.integers(0, 4), st.integers(1, 3))
@settings(max_examples=50)
def test_all_results_come_and_those_of_a_task_in_order(tasks, num_workers, capacity):
    tasks = list(enumerate(tasks))
    work = lambda: lambda task: ((task[0], step) for _, step in counting(task[1]))  # noqa: E731
    results = list(work_ahead(tasks, work, num_workers, capacity))
    expected = [(position, step) for position, number in tasks for _, step in counting(number)]
    assert sorted(results) == expected
    for position, _ in tasks:
        own = [step for task, step in results if task == position]
        assert own == sorted(own)


def test_workers_wait_for_a_slow_consumer():
    made = []

    def work(task):
        made.append(task)
        yield task

    results = work_ahead(range(100), lambda: work, num_workers=2, capacity=3)
    first = next(results)
    time.sleep(0.3)
    assert len(made) <= 1 + 3 + 2  # taken, waiting, in the hands of two workers
    assert sorted([first, *results]) == list(range(100))


def test_an_error_of_a_worker_reaches_the_consumer_and_ends_the_others():
    before = threading.active_count()

    def work(task):
        if task == 5:
            raise RuntimeError("frame 5")
        yield task

    with pytest.raises(RuntimeError, match="frame 5"):
        list(work_ahead(range(1000), lambda: work, num_workers=3, capacity=2))
    assert threading.active_count() == before


def test_a_consumer_that_stops_leaves_no_thread():
    before = threading.active_count()
    results = work_ahead(iter(range(10**9)), lambda: lambda task: [task], num_workers=3, capacity=2)
    next(results)
    results.close()
    assert threading.active_count() == before


def test_the_threads_of_tensor_operations_stay_as_they_were():
    seen, before = [], torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        work = lambda: lambda _: [seen.append(torch.get_num_threads())]  # noqa: E731
        list(work_ahead(range(4), work, num_workers=2, capacity=2))
        assert set(seen) == {1}
        assert torch.get_num_threads() == 2
        later: list[int] = []
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert later == [2]
    finally:
        torch.set_num_threads(before)
