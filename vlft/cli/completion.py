"""What a shell offers after TAB: the flags of a command, and the words that a flag takes."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple

from typer.core import TyperCommand

from vlft.cli.commands import COMMANDS
from vlft.settings import field_type, flag, is_repeatable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# Of every command, beside its settings.
COMMON = {
    "--config": "JSON or YAML file of settings; flags win.",
    "--debug": "Show the traceback of an error.",
    "--help": "Show this page.",
}


class Completion(NamedTuple):
    """A word that is offered; the fields are those that Typer's writers for the shells read."""

    value: str
    help: str = ""


class CompletedCommand(TyperCommand):
    """A command whose words Typer leaves unread, so that it knows none of its flags."""

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        """The words that may stand where ``incomplete`` does, after those of the context."""
        return completions(COMMANDS[str(self.name)].config, ctx.args, incomplete)


def completions(config: type, words: Sequence[str], incomplete: str) -> list[Completion]:
    """What may stand after the words of a command line; nothing where the shell offers files.

    Args:
        config: settings of the command.
        words: that stand between the command and the incomplete word.
        incomplete: the beginning of the word, which may be empty.
    """
    fields = {spec.name: spec for spec in dataclasses.fields(config)}
    # A shell may part --flag=word into three.
    before = [word for word in words if word != "="]
    named = [index for index, word in enumerate(before) if word.startswith("--")]
    spec = fields.get(before[named[-1]][2:].replace("-", "_")) if named else None
    if spec is not None and not incomplete.startswith("-"):
        is_next = named[-1] == len(before) - 1
        if is_repeatable(config, spec.name) or (
            is_next and field_type(config, spec.name) is not bool
        ):
            words_of_flag = (word for word in spec.metadata["choices"] if word[:4] != "FILE")
            return [Completion(word) for word in words_of_flag if word.startswith(incomplete)]
    takes_words = any(field.metadata["argument"] for field in fields.values())
    if takes_words and not incomplete.startswith("-"):
        return []
    return [offer for offer in _flags(config) if offer.value.startswith(incomplete)]


def _flags(config: type) -> Iterator[Completion]:
    """All flags of a command with their help."""
    for spec in dataclasses.fields(config):
        if spec.metadata["argument"]:
            continue
        yield Completion(flag(spec.name), spec.metadata["help"])
        if spec.default is True:
            yield Completion(flag(f"no_{spec.name}"), spec.metadata["help"])
    for name, text in COMMON.items():
        yield Completion(name, text)
