"""Run calls in daemon threads, with a limit on their number and on the time that they take."""

import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

Result = TypeVar("Result")


def run_all(calls: Sequence[Callable[[], Result]], concurrency: int, time_limit: float | None = None) -> list[Result]:
    """Run calls in up to `concurrency` threads and return their results in order.

    The threads are daemons: an exception, Ctrl-C, SIGTERM and the end of the process do not wait for a call that does
    not return.

    Args:
        calls: Functions without arguments.
        concurrency: Calls that run at the same time, at least 1.
        time_limit: Seconds for all calls together; None for no limit.

    Raises:
        TimeoutError: The time limit has passed.
        BaseException: The first exception that a call raised.
    """
    waiting: queue.SimpleQueue[tuple[int, Callable[[], Result]]] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[int, Result | None, BaseException | None]] = queue.SimpleQueue()
    for item in enumerate(calls):
        waiting.put(item)
    results: dict[int, Any] = {}
    deadline = None if time_limit is None else time.monotonic() + time_limit
    with _raising_on_sigterm():
        for _ in range(min(concurrency, len(calls))):
            threading.Thread(target=_work, args=(waiting, done), daemon=True).start()
        while len(results) < len(calls):
            try:
                number, result, error = done.get(timeout=None if deadline is None else deadline - time.monotonic())
            except (queue.Empty, ValueError):  # ValueError: the deadline has passed already
                raise TimeoutError(f"no result within {time_limit:g} s") from None
            if error is not None:
                raise error
            results[number] = result
    return [results[number] for number in range(len(calls))]


def _work(waiting: Any, done: Any) -> None:
    while True:
        try:
            number, call = waiting.get_nowait()
        except queue.Empty:
            return
        try:
            done.put((number, call(), None))
        except BaseException as error:  # passed to the waiting thread
            done.put((number, None, error))
            return


@contextmanager
def _raising_on_sigterm() -> Iterator[None]:
    """Raise an exception on SIGTERM within this context; the Trainer's handler would only record the signal."""
    previous = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread() or not callable(previous):
        yield
        return
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    def handle(number: int, frame: Any) -> None:
        previous(number, frame)
        raise SIGTERMException

    signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
