"""``vlft serve`` and ``vlft app``: from the settings to a server that stops in good order."""

from __future__ import annotations

import importlib
import logging
import socket
import sys
from contextlib import closing
from typing import TYPE_CHECKING

from vlft import console
from vlft.errors import ConfigError
from vlft.serving.models import find_models, load_models
from vlft.settings import check

if TYPE_CHECKING:
    from vlft.config import ServeConfig

LIBRARIES = ("fastapi", "uvicorn")


def run_serve(config: ServeConfig) -> None:
    """Answers requests until a signal ends it.

    Raises:
        VlftError: bad input, or a library is missing.
    """
    _serve(config, page=False)


def run_app(config: ServeConfig) -> None:
    """As ``run_serve``, with a page for a browser."""
    _serve(config, page=True)


def _serve(config: ServeConfig, *, page: bool) -> None:
    config = check(config)
    check_libraries("vlft app" if page else "vlft serve")
    from vlft.serving.api import make_api
    from vlft.serving.server import Server

    if "--debug" not in sys.argv:
        # It shows tracebacks; what failed is said by problems.report().
        logging.getLogger("uvicorn").setLevel(logging.CRITICAL)
    found = find_models(config)
    with closing(bind(config.host, config.port)) as listener:
        models = load_models(config, found)
        server = Server(make_api(config, models, page=page), config.stop_timeout)
        console.info(f"models: {', '.join(models.served)}")
        address = f"http://{_shown(config.host)}:{listener.getsockname()[1]}"
        console.info(f"{address}{'' if page else '/v1'} (Ctrl-C stops)")
        server.run(sockets=[listener])
    console.info("stopped")


def check_libraries(command: str) -> None:
    """Raises ConfigError if a library of the extra is missing."""
    for name in LIBRARIES:
        try:
            importlib.import_module(name)
        except ImportError:
            hint = "pip install 'vlft[serve]'"
            raise ConfigError(f"needs {name}", place=command, hint=hint) from None


def bind(host: str, port: int) -> socket.socket:
    """A socket at an address; it listens once the model is there.

    Raises:
        ConfigError: there is no such address, or it is in use.
    """
    try:
        kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(kind, socket.SOCK_STREAM)
        try:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(address)
        except OSError:
            found.close()
            raise
    except OSError as error:
        reason = error.strerror or str(error)
        hint = "choose another --port (0 takes a free one) or --host"
        raise ConfigError(
            f"cannot listen on {host}:{port} ({reason})", place="--port", hint=hint
        ) from None
    return found


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host
