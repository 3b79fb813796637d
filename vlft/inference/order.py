"""The order in which records are answered.

    portion   records with their groups, of some batches; the group with the longest prompt first
    batch     the next records of a portion, by length, longest first
    span      batches whose prompts are computed together, because they cut through a group

A group is the records on one image. Nothing here depends on what is answered already: a command
that goes on forms the same batches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlft.packing.prefix_tree import common_prefix

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Mapping, Sequence

    from vlft.data.encode import EncodedSample

# Batches of a portion, within which records are sorted by length.
PORTION = 16
# Tokens of a span, in those of a padded batch of the longest prompt.
SPAN = 2

Batch = list[int]


def portions(
    groups: Sequence[Hashable], lengths: Sequence[int], batch_size: int
) -> Iterator[list[int]]:
    """The records in portions: groups in the order of the data, after that of the longest prompt.

    Too little memory then shows at once, and lines can be written soon.

    Args:
        groups: a key of each record.
        lengths: tokens of each record; may be estimates.
        batch_size: records of a batch.
    """
    members: dict[Hashable, list[int]] = {}
    for record, group in enumerate(groups):
        members.setdefault(group, []).append(record)
    longest = groups[max(range(len(groups)), key=lengths.__getitem__)]
    order = [record for group in {longest: None, **members} for record in members[group]]
    size = PORTION * batch_size
    return (order[start : start + size] for start in range(0, len(order), size))


def spans(
    prompts: Mapping[int, EncodedSample], groups: Sequence[Hashable], batch_size: int
) -> Iterator[list[Batch]]:
    """The batches of a portion, those together whose prompts are computed together.

    Args:
        prompts: of the portion's records, by their numbers.
        groups: as for ``portions``.
        batch_size: records of a batch.
    """
    longest: dict[Hashable, int] = {}
    for record, prompt in prompts.items():
        longest[groups[record]] = max(longest.get(groups[record], 0), len(prompt))
    first = {group: number for number, group in enumerate(longest)}
    order = sorted(
        prompts,
        key=lambda i: (-longest[groups[i]], first[groups[i]], -len(prompts[i]), i),
    )
    room = SPAN * batch_size * max(longest.values())
    span: list[Batch] = []
    used = 0
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        pairs = zip(order[max(0, start - 1) :], batch[start == 0 :], strict=False)
        new = len(prompts[order[0]]) * (start == 0)
        new += sum(_new_tokens(prompts[before], prompts[record]) for before, record in pairs)
        if span and (groups[span[-1][-1]] != groups[batch[0]] or used + new > room):
            yield span
            span, used = [], 0
        span.append(batch)
        used += new
    yield span


def _new_tokens(before: EncodedSample, prompt: EncodedSample) -> int:
    """Tokens that a prompt adds to a row after another, if their images are the same."""
    return len(prompt) - common_prefix(before.input_ids.tolist(), prompt.input_ids.tolist())
