"""Errors as AUTOMATIC1111's clients read them, and API keys as they send them."""

from __future__ import annotations

import base64
from collections.abc import Mapping

from starlette.responses import JSONResponse, Response

from mii_serve.errors import InvalidRequestError, MiiServeError, UnauthenticatedError
from mii_serve.gateway.errors import Blocked, problem_headers, problem_of
from mii_serve.gateway.middleware import authorization_of
from mii_serve.server.call import AUTHORIZATION_KEY

UNPROCESSABLE = 422
"""What that server answers to a member that breaks a rule."""


class SdapiDialect:
    """`detail` says it in a sentence; `body` names the member that is to blame, where one is."""

    def refusal(self, error: MiiServeError, request_id: str) -> Response:
        problem = problem_of(error, failed=500, late=504)
        is_rule = isinstance(error, InvalidRequestError) and not isinstance(error, Blocked) and problem.status == 400
        headers = problem_headers(problem)
        if isinstance(error, UnauthenticatedError):
            headers["www-authenticate"] = "Basic"
        body = {"error": problem.code, "detail": problem.message, "body": problem.field or "", "errors": problem.message}
        return JSONResponse(body, UNPROCESSABLE if is_rule else problem.status, headers)

    def last_event(self, error: MiiServeError, request_id: str) -> bytes:
        raise AssertionError("no answer of this API is a stream")


def key_of(headers: Mapping[str, str]) -> str | None:
    """The API key as `authorization` has it; of HTTP's Basic scheme it is the password, whatever the user's name."""
    scheme, _, given = headers.get(AUTHORIZATION_KEY, "").partition(" ")
    if scheme.lower() == "basic" and "api-key" not in headers:
        try:
            text = base64.b64decode(given.strip(), validate=True).decode()
        except ValueError:
            return headers[AUTHORIZATION_KEY]
        name, colon, password = text.partition(":")
        return f"Bearer {password if colon else name}"
    return authorization_of(headers)
