"""The records of a data set -> their replies in the result file, batch by batch."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from vlft import console
from vlft.inference.decoding import record_seed
from vlft.inference.formats import text_of
from vlft.inference.order import portions, spans

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from vlft.config import InferConfig
    from vlft.data.dataset import Dataset
    from vlft.data.documents import Pages
    from vlft.families.processor import Processor
    from vlft.inference.replier import Replier, Reply
    from vlft.inference.results import ResultFile
    from vlft.inference.saved_text import SavedText


def answer(
    repliers: Sequence[Callable[[], Replier]],
    processor: Processor,
    data: Dataset,
    pages: Pages,
    results: ResultFile,
    texts: SavedText | None,
    config: InferConfig,
) -> None:
    """Answers the records that the result file does not answer yet.

    Args:
        repliers: of the model, or of each checkpoint that answers, put in place by the call.
        processor: of the model.
        data: all records.
        pages: of documents, which are drawn once their turn comes.
        results: the file.
        texts: of the documents that the records are pages of, if they are asked for.
        config: of the command.

    Raises:
        VlftError: an image cannot be read any more, or there is too little memory.
    """
    batches = -(-(results.total - results.answered) // config.batch_size)
    answers = _answers(repliers, processor, data, pages, results, config)
    begin, tokens = time.monotonic(), 0

    def speed() -> str:
        """Tokens of replies by the time since the first prompt."""
        return f"{tokens / (time.monotonic() - begin):,.0f} tokens/s" if tokens else ""

    for numbers, replies in console.tracked(answers, "answering", batches, speed):
        tokens += sum(len(reply.token_ids) for reply in replies)
        written = results.put(numbers, replies)
        if texts is not None:
            texts.add([text_of(reply, config.format) for reply in written])


def _answers(
    repliers: Sequence[Callable[[], Replier]],
    processor: Processor,
    data: Dataset,
    pages: Pages,
    results: ResultFile,
    config: InferConfig,
) -> Iterator[tuple[list[int], list[Reply]]]:
    """The replies that are missing, batch by batch, each with the numbers of its lines."""
    groups, sides = data.groups(), len(repliers)

    def lines(records: Sequence[int], side: int) -> list[int]:
        return [record * sides + side for record in records]

    for portion in portions(groups, data.lengths.tolist(), config.batch_size):
        if all(map(results.answers, (n for side in range(sides) for n in lines(portion, side)))):
            continue
        prompts = {
            number: processor.encode_conversation(data.conversations[number].without_reply())
            for number in portion
        }
        for span in spans(prompts, groups, config.batch_size):
            # All of the span: the same row as in a command that was not stopped.
            chosen = [number for batch in span for number in batch]
            places = {number: place for place, number in enumerate(chosen)}
            for side, replier in enumerate(repliers):
                missing = [b for b in span if not all(map(results.answers, lines(b, side)))]
                if not missing:
                    continue
                pages.draw(image.path for number in chosen for image in prompts[number].images)
                ours = replier()
                made = ours.replies(
                    [prompts[number] for number in chosen],
                    [record_seed(config.seed, data.positions[number]) for number in chosen],
                    [[places[number] for number in batch] for batch in missing],
                )
                for batch, replies in zip(missing, made, strict=True):
                    if config.label_loss:
                        records = (data.conversations[number] for number in batch)
                        replies = list(map(ours.with_loss, replies, records))
                    yield lines(batch, side), replies
