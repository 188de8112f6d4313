"""What works beside a test, in threads of its own, and ends with it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Protocol, Self, TypeVar

T = TypeVar("T")


class Threads:
    """Each does one piece of work, which looks at the event that it is given, and returns once that is set.

    stopping: the event.
    """

    def __init__(self, name: str, *works: Callable[[threading.Event], None]) -> None:
        self.stopping = threading.Event()
        self.__errors: list[Exception] = []
        self.__threads = [
            threading.Thread(target=self.__work, args=(work,), name=f"{name}-{number}")
            for number, work in enumerate(works)
        ]

    def __enter__(self) -> Self:
        for thread in self.__threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.__join()

    def stop(self) -> None:
        """Wait until all have returned; raises what went wrong in one."""
        self.__join()
        if self.__errors:
            raise self.__errors[0]

    def __join(self) -> None:
        self.stopping.set()
        for thread in self.__threads:
            thread.join()

    def __work(self, work: Callable[[threading.Event], None]) -> None:
        try:
            work(self.stopping)
        except Exception as exc:  # noqa: BLE001 - a thread has no caller: `stop` raises it
            self.__errors.append(exc)


class Worker(Protocol):
    """What runs until an event is set, as a pipeline's thread does."""

    def run(self, stop: threading.Event) -> object:
        """Work."""
        ...


@contextmanager
def running(worker: Worker, wake: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Run it beside the block, and no longer; raises what it does. wake: called when it is to end."""
    stop = threading.Event()
    with ThreadPoolExecutor(1) as thread:
        done = thread.submit(worker.run, stop)
        try:
            yield
        finally:
            stop.set()
            wake()
        done.result(timeout=60)


class EventLoop:
    """An asyncio loop in a thread, for servers that blocking tests talk to."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name)
        self._thread.start()

    def start(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Run it beside the caller."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Wait for its result."""
        return self.start(coroutine).result(60)

    def call(self, callback: Callable[[], object]) -> None:
        """Call it soon."""
        self._loop.call_soon_threadsafe(callback)

    def close(self) -> None:
        """Cancel what runs, and end."""
        self.run(_cancel_others())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
