"""Try many inputs in a process that may break: forked, with little memory and little time for each input."""

import gc
import json
import logging
import mmap
import os
import resource
import signal
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

MEMORY_BYTES = 512 << 20
SECONDS = 5.0
MOST_FAILURES = 5


def try_all(
    inputs: Iterable[tuple[str, Any]],
    check: Callable[[Any], str],
    memory: int = MEMORY_BYTES,
    seconds: float = SECONDS,
) -> Counter[str]:
    """Give every input to `check` in a forked process.

    Args:
        inputs: Name (enough to make it again) and input; made in that process.
        check: Says in a word what came of an input, and raises if that is wrong.
        memory: Address space, beyond what the process has at its start.
        seconds: Of computing, for one input (of waiting, twelve times that: the machine may be busy); then
            the process is killed, in whatever code it is.

    Returns:
        How often `check` said which word.

    Raises:
        AssertionError: `check` raised, or the process died; names the input.
    """
    current = mmap.mmap(-1, 1 << 12)  # shared: still readable when the process is dead
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        _confine(memory)
        report: dict[str, Any] = {"failures": [], "counts": {}}
        try:
            report = _run(inputs, check, seconds, current)
        except BaseException:  # of the inputs' own making
            report["failures"].append(f"while inputs were made:\n{traceback.format_exc()}")
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
            with os.fdopen(writer, "w") as pipe:
                json.dump(report, pipe)
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        told = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    name = bytes(current).rstrip(b"\0").decode(errors="replace")
    reason = (
        "took too long" if status in (-signal.SIGALRM, -signal.SIGPROF) else f"killed the process ({status})"
    )
    assert status == 0, f"{name}: {reason}"
    report = json.loads(told)
    assert not report["failures"], "\n\n".join(report["failures"])
    return Counter(report["counts"])


def _run(
    inputs: Iterable[tuple[str, Any]], check: Callable[[Any], str], seconds: float, current: mmap.mmap
) -> dict[str, Any]:
    counts: Counter[str] = Counter()
    failures: list[str] = []
    for name, value in inputs:
        current[:] = name.encode(errors="replace")[: len(current)].ljust(len(current), b"\0")
        signal.setitimer(signal.ITIMER_PROF, seconds)
        signal.setitimer(signal.ITIMER_REAL, 12 * seconds)
        try:
            counts[check(value)] += 1
        except BaseException:
            failures.append(f"{name}:\n{traceback.format_exc()[-4000:]}")
        if len(failures) >= MOST_FAILURES:
            break
    return {"counts": counts, "failures": failures}


def _confine(memory: int) -> None:
    gc.freeze()  # the collector need not touch, and so copy, what the parent has
    logging.disable(logging.CRITICAL)
    for number in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(number, signal.SIG_DFL)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + memory
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
