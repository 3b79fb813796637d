"""What is wrong with a request: the status of the answer, and its body in OpenAI's form."""

from __future__ import annotations

import sys
from traceback import format_exception
from typing import Any

from vlft.console import err, show_error
from vlft.errors import UsageError, VlftError, printable

# The ``type`` of a body, by status; others are the server's fault.
TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class ApiError(VlftError):
    """A request that gets another answer than a reply.

    Args:
        status: of HTTP.
        message: what was found, and what is allowed.
        place: the field of the request, if it is one.
        code: a word for programs.
        hint: what to do.
    """

    def __init__(
        self, status: int, message: str, *, place: str = "", code: str = "", hint: str = ""
    ) -> None:
        super().__init__(message, place=place, hint=hint)
        self.status, self.code = status, code

    @property
    def body(self) -> dict[str, Any]:
        """The body of the answer."""
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "api_error")
        text = f"{self.place}: {self.message}" if self.place else self.message
        text += f" (hint: {self.hint})" if self.hint else ""
        fields = {"message": text, "type": kind, "param": self.place or None}
        return {"error": {**fields, "code": self.code or None}}


def as_answer(error: BaseException) -> ApiError:
    """The answer to a request that led to an error; the details of a fault stay here."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UsageError):
        return ApiError(400, error.message, place=error.place, code="invalid_value")
    if isinstance(error, VlftError):
        return ApiError(500, error.message, code="failed")
    return ApiError(500, "the server failed; its log says why", code="failed")


def report(error: BaseException) -> None:
    """Shows an error that is not the client's where the server runs; with --debug all of it."""
    answer = as_answer(error)
    if answer.status < 500:
        return
    if "--debug" in sys.argv:
        err.print(printable("".join(format_exception(error)), keep="\n"), markup=False)
    ours = isinstance(error, VlftError)
    show_error(f"a request failed: {error if ours else f'{type(error).__name__}: {error}'}")
