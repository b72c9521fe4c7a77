"""Threads that work ahead of one consumer. Decoders release the GIL, and nothing needs pickling."""

import queue
import threading
from collections.abc import Callable, Generator, Iterable

import torch


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

    def run() -> None:
        torch.set_num_threads(1)  # of this thread's tensor operations: the workers are the parallelism
        try:
            worker = make_worker()
            while not stopped.is_set():
                with lock:
                    task = _DONE if stopped.is_set() else next(remaining, _DONE)
                if task is _DONE:
                    break
                for result in worker(task):  # type: ignore[arg-type]
                    if not _put(results, result, stopped):
                        return
            _put(results, _DONE, stopped)
        except BaseException as error:
            _put(results, _Failure(error), stopped)
        finally:
            torch.set_num_threads(usual_threads)  # later threads start with what was set last

    threads = [threading.Thread(target=run, name=f"decode-{n}", daemon=True) for n in range(num_workers)]
    for thread in threads:
        thread.start()
    try:
        running = num_workers
        while running:
            result = results.get()
            if isinstance(result, _Failure):
                raise result.error
            if result is _DONE:
                running -= 1
            else:
                yield result
    finally:
        stopped.set()
        for thread in threads:
            thread.join()


_DONE: object = object()


class _Failure:
    def __init__(self, error: BaseException) -> None:
        self.error = error


def _put(results: queue.Queue, item: object, stopped: threading.Event) -> bool:
    """Put `item`, or give up once nobody takes any more."""
    while not stopped.is_set():
        try:
            results.put(item, timeout=0.1)
        except queue.Full:
            continue
        return True
    return False
