"""Prefetching: items are made in the background before they are asked for."""

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Any


class Prefetch:
    """Iterates once over `items`, which another thread takes from their source, at most `depth` ahead.

    What the source raises is raised where the items are used. An iteration that is left early, or
    `close`, ends the thread.

    >>> list(Prefetch(number**2 for number in range(4)))
    [0, 1, 4, 9]
    """

    def __init__(self, items: Iterable[Any], depth: int = 2):
        self._queue: queue.Queue = queue.Queue(depth)
        self._closed = threading.Event()
        threading.Thread(target=self._work, args=(items,), daemon=True).start()

    def close(self) -> None:
        """Lets the thread end and forgets what it had prepared."""
        self._closed.set()
        while not self._queue.empty():
            self._queue.get_nowait()

    def __iter__(self) -> Iterator[Any]:
        try:
            while True:
                item, end = self._queue.get()
                if isinstance(end, StopIteration):
                    return
                if end is not None:
                    raise end
                yield item
        finally:
            self.close()

    def _work(self, items: Iterable[Any]) -> None:
        end: BaseException = StopIteration()
        try:
            for item in items:
                if not self._put((item, None)):
                    return
        except BaseException as error:
            end = error
        self._put((None, end))

    def _put(self, entry: tuple) -> bool:
        """Waits for room; returns False once the iteration is closed."""
        while not self._closed.is_set():
            try:
                self._queue.put(entry, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False
