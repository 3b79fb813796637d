"""``vlft push``: an adapter or a model, with its card, to a repository on the hub."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlft import console
from vlft.errors import ConfigError, VlftError, shown
from vlft.files import open_regular, write_whole
from vlft.settings import check
from vlft.sharing.card import MARK, NAME, card
from vlft.sharing.contents import contents
from vlft.sharing.source import Source, front_matter, licence_in, open_source

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from vlft.config import PushConfig

LOGIN = "log in with: hf auth login, with a token that may write"


@dataclass(frozen=True)
class PushResult:
    """The card that was written, and the address of the commit; empty without a repository."""

    card: Path
    address: str


def run_push(config: PushConfig) -> PushResult:
    """Writes the card, and uploads the folder if a repository is named.

    Raises:
        VlftError: there is nothing to share, or the hub does not take it. The card stays.
    """
    config = check(config)
    if config.folder is None:
        raise ConfigError("found no folder", place="vlft push")
    source = open_source(config.folder, config.run)
    licence = _licence(source, online=config.repo is not None)
    path = source.folder / NAME
    if _is_own(path):
        write_whole(path, card(source, config.repo, licence))
        console.info(f"model card: {shown(path)}")
    else:
        console.info(f"model card: {shown(path)}, which vlft has not written and leaves as it is")
    if config.repo is None:
        console.info("nothing was uploaded: name a repository, OWNER/NAME, to do that")
        return PushResult(path, "")
    address = _upload(source, config.repo, config)
    console.info(f"pushed: {address}")
    return PushResult(path, address)


def _is_own(path: Path) -> bool:
    """Whether the card may be written: a card that the user has written must not be lost."""
    if not path.exists() and not path.is_symlink():
        return True
    if path.is_symlink() or not path.is_file():
        return False
    with open_regular(path) as file:
        return MARK.encode() in file.read(4096)


def _licence(source: Source, *, online: bool) -> dict[str, str]:
    """The licence that the base's own card states, in its folder or on the hub; empty if none."""
    from pathlib import Path

    if source.base is not None and (found := front_matter(Path(source.base) / NAME)):
        return found
    if source.hub_base is None or not online:
        return {}
    with _hub(source.hub_base):
        data = _api().model_info(source.hub_base).card_data
        return licence_in(data.to_dict()) if data is not None else {}


def _upload(source: Source, repo: str, config: PushConfig) -> str:
    """Creates the repository if there is none, and adds one commit; returns its address."""
    from huggingface_hub import CommitOperationAdd, get_token

    if get_token() is None:
        raise ConfigError("found no token of the hub", place=repo, hint=LOGIN)
    operations = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=content)
        for name, content in contents(source)
    ]
    api = _api()
    with _hub(repo):
        if api.repo_exists(repo) and not config.overwrite:
            hint = "name another one, or add --overwrite: its history keeps what is there"
            raise ConfigError("exists on the hub", place=repo, hint=hint)
        api.create_repo(repo, private=not config.public, exist_ok=True)
        made: Any = api.create_commit(
            repo, operations, commit_message=f"{source.folder.name} by vlft push"
        )
    return str(getattr(made, "commit_url", made))


def _api() -> Any:
    from huggingface_hub import HfApi

    return HfApi(library_name="vlft")


@contextmanager
def _hub(repo: str) -> Iterator[None]:
    """Says of a hub that refuses or does not answer what to do; nothing is lost here.

    Raises:
        VlftError: it did.
    """
    from huggingface_hub import errors
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    # Of the library that it sends requests with, which is another one in each release.
    unanswered: Any = (vars(errors)["HTTPError"], OfflineModeIsEnabled, ConnectionError)
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        hint = "try again later; the card and the folder stay as they are"
        if status in (401, 403):
            hint = LOGIN + f"; it must be allowed to write to {repo.split('/')[0]}"
        raise VlftError(f"the hub refuses it ({_first(error)})", place=repo, hint=hint) from None
    except HFValidationError as error:
        raise ConfigError(_first(error), place=repo, hint="name it OWNER/NAME") from None
    except unanswered as error:
        hint = "check the network, HF_ENDPOINT and HF_HUB_OFFLINE, then run the command again"
        found = f"the hub does not answer ({_first(error)})"
        raise VlftError(found, place=repo, hint=hint) from None


def _first(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
