"""Work done ahead of its turn, results in order, memory for a few of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_ahead(work: Callable[[Item], Result], items: Iterable[Item], *, ahead: int) -> Iterator[Result]:
    """Yield ``work(item)`` of each item in order, as ``map`` does, while threads are at most ``ahead`` items further.

    It pays where ``work`` spends its time outside the interpreter's lock. With ``ahead`` 0 there is no thread. What
    ``work`` raises comes out at its item's turn. (``Executor.map`` has this as ``buffersize`` from Python 3.14 on.)
    """
    if not ahead:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(ahead) as threads:
        coming: deque[Future[Result]] = deque()
        try:
            for item in items:
                coming.append(threads.submit(work, item))
                if len(coming) > ahead:
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()
        finally:
            for future in coming:
                future.cancel()
