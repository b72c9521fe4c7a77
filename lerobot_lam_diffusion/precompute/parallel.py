"""Threads that work ahead of one consumer. Decoders release the GIL, and nothing needs pickling."""

import contextlib
import queue
import threading
from collections.abc import Callable, Generator, Iterable
from typing import Any

import torch

_DONE: Any = object()


def work_ahead[T, R](
    tasks: Iterable[T],
    make_worker: Callable[[], Callable[[T], Iterable[R]]],
    num_workers: int,
    capacity: int,
) -> Generator[R]:
    """Results of all tasks as they arrive: in order within a task, interleaved between tasks.

    Args:
        tasks: Started in order.
        make_worker: Called once in each thread; what it returns gives the results of one task.
        num_workers: Threads; 0: none, everything runs lazily and in order.
        capacity: Results that may wait for the consumer; workers pause beyond that.

    Raises:
        Exception: a worker's own, as soon as it happens; the other workers stop.
    """
    if num_workers == 0:
        worker = make_worker()
        for task in tasks:
            yield from worker(task)
        return
    remaining, lock = iter(tasks), threading.Lock()
    results: queue.Queue = queue.Queue(capacity)
    stopped = threading.Event()
    usual_threads = torch.get_num_threads()

    def put(result: object) -> None:
        """Wait for room; once nobody takes any more, the result is dropped."""
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                results.put(result, timeout=0.1)
                return

    def run() -> None:
        torch.set_num_threads(1)  # of this thread's tensor operations: the workers are the parallelism
        try:
            worker = make_worker()
            while True:
                with lock:
                    task = _DONE if stopped.is_set() else next(remaining, _DONE)
                if task is _DONE:
                    put(_DONE)
                    return
                for result in worker(task):
                    put(result)
                    if stopped.is_set():
                        return
        except BaseException as error:
            put(error)
        finally:
            torch.set_num_threads(usual_threads)  # later threads start with what was set last

    threads = [threading.Thread(target=run, name=f"decode-{n}", daemon=True) for n in range(num_workers)]
    for thread in threads:
        thread.start()
    try:
        running = num_workers
        while running:
            result = results.get()
            if isinstance(result, BaseException):
                raise result
            if result is _DONE:
                running -= 1
            else:
                yield result
    finally:
        stopped.set()
        for thread in threads:
            thread.join()
