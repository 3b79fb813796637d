"""A reply that is being made: the model's thread writes it, the server's loop reads it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from vlft.inference.text_stream import TextStream
from vlft.serving.problems import ApiError, as_answer, report

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from vlft.data.encode import EncodedSample
    from vlft.inference.generate import Sampling
    from vlft.inference.replier import Reply
    from vlft.serving.models import Served


@dataclass(frozen=True)
class Ended:
    """How a reply ended: at its end or a stop text, or cut off; and its tokens."""

    finish: Literal["stop", "length"]
    tokens: int


class Job:
    """A prompt that waits for its reply, and then the reply as it grows.

    Args:
        served: the model that is asked.
        prompt: of it.
        sampling: how the reply is generated, all settings resolved.
        most: new tokens.
        seed: of its draws.
        stop: texts that end it.
        release: called once nobody needs the prompt's images any more.

    Attributes:
        cancelled: whether nobody waits for the reply any more.
        ended: how it ended; None before.
        tokens: generated so far.
        alone: whether it is not to be answered together with others.
    """

    def __init__(
        self,
        served: Served,
        prompt: EncodedSample,
        sampling: Sampling,
        most: int,
        seed: int,
        stop: Sequence[str],
        release: Callable[[], None],
    ) -> None:
        self.served, self.prompt, self.sampling = served, prompt, sampling
        self.most, self.seed = most, seed
        self.cancelled = self.alone = False
        self.ended: Ended | None = None
        self._release = release
        self._text = TextStream(served.processor.reply_text, stop)
        self.tokens = 0
        self._loop = asyncio.get_running_loop()
        # Pieces of the text; None or an error at the end.
        self._pieces: asyncio.Queue[str | ApiError | None] = asyncio.Queue()

    @property
    def key(self) -> tuple[str, Sampling]:
        """Equal for those that can be answered together."""
        return self.served.id, self.sampling

    def take(self, token_ids: list[int]) -> bool:
        """The next tokens, in the model's thread; returns whether the reply is to end here."""
        self.tokens += len(token_ids)
        self._write(self._text.take(token_ids))
        return self.cancelled or self._text.stopped

    def finish(self, reply: Reply) -> None:
        """The end of the reply, in the model's thread."""
        is_stopped = self._text.stopped
        self._write(self._text.end())
        tokens = self.tokens if is_stopped else len(reply.token_ids)
        at_end = self._text.stopped or reply.finish == "stop"
        self.ended = Ended("stop" if at_end else "length", tokens)

    def leave(self, error: BaseException | None = None) -> None:
        """The job is over, in the server's loop: nothing is computed for it any more."""
        self._release()
        if error is not None:
            report(error)
        self._pieces.put_nowait(None if error is None else as_answer(error))

    async def pieces(self) -> AsyncIterator[str]:
        """The text, piece by piece.

        Raises:
            ApiError: it ended too early.
        """
        while (piece := await self._pieces.get()) is not None:
            if isinstance(piece, ApiError):
                raise piece
            yield piece

    def _write(self, piece: str) -> None:
        if piece:
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)
