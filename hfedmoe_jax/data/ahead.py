"""Work done ahead of its use, in the background."""

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Any


class Ahead:
    """Iterates over `items`, which another thread takes from their source, at most `depth` of them ahead.

    What the source raises is raised where the items are used.

    >>> list(Ahead(number**2 for number in range(4)))
    [0, 1, 4, 9]
    """

    def __init__(self, items: Iterable[Any], depth: int = 2):
        self._queue: queue.Queue = queue.Queue(depth)
        threading.Thread(target=self._work, args=(items,), daemon=True).start()

    def _work(self, items: Iterable[Any]) -> None:
        try:
            for item in items:
                self._queue.put((item, None))
            self._queue.put((None, StopIteration()))
        except BaseException as error:
            self._queue.put((None, error))

    def __iter__(self) -> Iterator[Any]:
        while True:
            item, end = self._queue.get()
            if isinstance(end, StopIteration):
                return
            if end is not None:
                raise end
            yield item
