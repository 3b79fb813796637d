"""Requests that wait -> batches, one after the other, in the one thread that uses the model.

admitted -> prompt prepared -> waiting -> in the batch -> left
"""

from __future__ import annotations

import asyncio
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

from vlft.serving.problems import ApiError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from vlft.serving.jobs import Job

# Seconds that the first request waits for others which arrive at the same time.
GATHER = 0.005


class Engine:
    """The queue, and the loop that answers it.

    Args:
        answer: answers jobs together; runs in the model's thread.
        batch_size: most jobs of a batch.
        most_waiting: most requests that are prepared or wait.
    """

    def __init__(
        self, answer: Callable[[Sequence[Job]], None], batch_size: int, most_waiting: int
    ) -> None:
        self._answer, self._batch_size, self._most_waiting = answer, batch_size, most_waiting
        self._waiting: deque[Job] = deque()
        self._arrived = asyncio.Event()
        self._preparing = 0
        self.running: list[Job] = []

    @property
    def waiting(self) -> int:
        """Requests that are being prepared or wait."""
        return self._preparing + len(self._waiting)

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place among the requests that wait, while one is being prepared.

        Raises:
            ApiError: there is none.
        """
        if self.waiting >= self._most_waiting:
            found = f"{self.waiting} requests are waiting, which is the most"
            raise ApiError(429, found, code="queue_full", hint="try again in a moment")
        self._preparing += 1
        try:
            yield
        finally:
            self._preparing -= 1

    def put(self, job: Job) -> None:
        """Lets a job wait for its turn."""
        self._waiting.append(job)
        self._arrived.set()

    def drop(self, job: Job) -> None:
        """Gives a job up: it leaves the queue, or its reply ends at the next token."""
        job.cancelled = True
        if job in self._waiting:
            self._waiting.remove(job)
            job.leave()

    def drop_all(self) -> None:
        """Gives all jobs up."""
        for job in [*self._waiting, *self.running]:
            self.drop(job)

    async def run(self) -> None:
        """Answers jobs until it is cancelled, and then returns once the model's thread is idle."""
        try:
            with ThreadPoolExecutor(1, "model") as pool:
                await self._answer_all(pool)
        finally:
            for job in self.running:
                job.leave()

    async def _answer_all(self, pool: ThreadPoolExecutor) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._arrived.wait()
            await asyncio.sleep(GATHER)
            self.running = self._next()
            if not self.running:
                self._arrived.clear()
                continue
            work = loop.run_in_executor(pool, self._answer, self.running)
            try:
                await asyncio.wait([work])
            except asyncio.CancelledError:
                self.drop_all()
                raise
            done, self.running = self.running, []
            self._sort_out(done, work.exception())
            # The traceback of an error holds what the batch had in memory.
            del work, done

    def _sort_out(self, done: Sequence[Job], error: BaseException | None) -> None:
        """Lets the jobs of a batch leave; after an error those without a token are tried alone.

        It may be that of one of them, or the batch took too much memory.
        """
        again = [job for job in done if error and len(done) > 1 and not job.tokens]
        for job in reversed(again):
            job.alone = True
            self._waiting.appendleft(job)
        for job in done:
            if job not in again:
                job.leave(error)
            elif job.cancelled:
                self.drop(job)

    def _next(self) -> list[Job]:
        """The job that has waited longest, with the next ones that can be answered with it."""
        if not self._waiting:
            return []
        first = self._waiting[0]
        alike = [job for job in self._waiting if job.key == first.key and not job.alone]
        batch = [first] if first.alone else alike[: self._batch_size]
        for job in batch:
            self._waiting.remove(job)
        return batch
