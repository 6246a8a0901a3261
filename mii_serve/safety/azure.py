"""Azure AI Content Safety as a moderator.

Fails closed: no answer in time, a refusal, an error, an answer without a severity for every category are all
`ModerationFailedError`. The SDK is imported only where content safety is configured. Neither key nor text is ever logged.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from mii_serve import __version__
from mii_serve.config import ContentSafetyConfig
from mii_serve.errors import ConfigError, ContentBlockedError, ModerationFailedError
from mii_serve.extras import how_to_get
from mii_serve.safety.moderation import ModerationVerdict, Moderator

if TYPE_CHECKING:
    from azure.identity.aio import ManagedIdentityCredential

logger = logging.getLogger(__name__)

CATEGORIES = ("Hate", "SelfHarm", "Sexual", "Violence")
MAX_SEVERITY = 7
CONNECT_TIMEOUT_S = 5.0
NUM_REPEATS = 1
"""Of a failed call, which is safe to repeat. `timeout_s` bounds all tries together."""
REPEATED = frozenset({"POST"})


@contextlib.asynccontextmanager
async def open_moderator(settings: ContentSafetyConfig) -> AsyncIterator[Moderator | None]:
    """The moderator these settings ask for while the block runs; None where they ask for none.

    Raises:
        ConfigError: the SDK is not installed.
    """
    if not settings.is_on:
        yield None
        return
    moderator = AzureModerator(settings)
    if settings.url.startswith("http:") and urlsplit(settings.url).hostname not in ("127.0.0.1", "::1", "localhost"):
        logger.warning("prompts, pictures and the key reach content safety at %s in plain text", settings.url)
    logger.info("content safety by %s, above severity %d is blocked", settings.url, settings.threshold)
    try:
        yield moderator
    finally:
        await moderator.close()


class AzureModerator:
    """Asks the service with a key or as a managed identity, which needs the role Cognitive Services User."""

    def __init__(self, settings: ContentSafetyConfig) -> None:
        try:
            from azure.ai.contentsafety.aio import ContentSafetyClient
            from azure.core.credentials import AzureKeyCredential
            from azure.identity.aio import ManagedIdentityCredential
        except ModuleNotFoundError as error:
            raise ConfigError("content_safety", f"{error.name} is not installed: {how_to_get('azure')}") from error
        logging.getLogger("azure").setLevel(logging.WARNING)  # at INFO it logs every header
        self._settings = settings
        self._identity: ManagedIdentityCredential | None = None
        credential: AzureKeyCredential | ManagedIdentityCredential
        if settings.key is not None:
            credential = AzureKeyCredential(settings.key.get_secret_value())
        else:
            client_id = None if settings.client_id == "system" else settings.client_id
            credential = self._identity = ManagedIdentityCredential(client_id=client_id)
        self._client = ContentSafetyClient(
            settings.url,
            credential,
            connection_timeout=min(CONNECT_TIMEOUT_S, settings.timeout_s),
            read_timeout=settings.timeout_s,
            retry_total=NUM_REPEATS,
            permit_redirects=False,  # the SDK would take the key along
            user_agent=f"mii_serve/{__version__}",
        )

    def __repr__(self) -> str:
        return f"AzureModerator({self._settings.url!r})"

    async def check_texts(self, prompt: str, negative_prompt: str) -> None:
        """See `Moderator`. A text of nothing but spaces is not checked: the service refuses it."""
        texts = {"prompt": prompt, "negative_prompt": negative_prompt}
        fields = [name for name, text in texts.items() if text.strip()]
        checks = [asyncio.ensure_future(self._in_time(self._check_text(texts[name]))) for name in fields]
        try:
            verdicts = await asyncio.gather(*checks)
        finally:
            for check in checks:  # the first failure decides
                check.cancel()
        for name, verdict in zip(fields, verdicts, strict=True):
            if verdict.is_blocked:
                raise ContentBlockedError(name, verdict.categories, on_blocklist=verdict.on_blocklist)

    async def check_image(self, image: bytes) -> ModerationVerdict:
        return await self._in_time(self._check_picture(image))

    async def close(self) -> None:
        await self._client.close()
        if self._identity is not None:
            await self._identity.close()

    async def _in_time(self, check: Awaitable[ModerationVerdict]) -> ModerationVerdict:
        """The verdict of `check`; every way of its failing becomes one error."""
        from azure.core.exceptions import AzureError, ClientAuthenticationError, HttpResponseError

        try:
            async with asyncio.timeout(self._settings.timeout_s):
                return await check
        except TimeoutError as error:
            raise ModerationFailedError(f"content safety did not answer within {self._settings.timeout_s:g} s") from error
        except HttpResponseError as error:
            if self._identity is not None and isinstance(error, ClientAuthenticationError):
                raise ModerationFailedError("the managed identity has no token that content safety accepts") from error
            if error.status_code is None:
                raise ModerationFailedError("the answer of content safety broke off") from error
            code = f" ({error.error.code})" if error.error and error.error.code else ""
            raise ModerationFailedError(f"content safety answered HTTP {error.status_code}{code}") from error
        except (AzureError, OSError) as error:
            raise ModerationFailedError("content safety cannot be reached") from error
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:  # the SDK, reading what it got
            raise ModerationFailedError("content safety answered something that is no verdict") from error

    async def _check_text(self, text: str) -> ModerationVerdict:
        asked: dict[str, Any] = {"text": text}
        if self._settings.blocklists:
            asked |= {"blocklistNames": list(self._settings.blocklists), "haltOnBlocklistHit": False}
        result = await self._client.analyze_text(asked, retry_on_methods=REPEATED)
        matches = _member(result, "blocklistsMatch", list) if self._settings.blocklists else []
        return ModerationVerdict(categories=self._too_severe(result), on_blocklist=bool(matches))

    async def _check_picture(self, image: bytes) -> ModerationVerdict:
        from azure.ai.contentsafety.models import AnalyzeImageOptions, ImageData

        options = AnalyzeImageOptions(image=ImageData(content=image))
        result = await self._client.analyze_image(options, retry_on_methods=REPEATED)
        return ModerationVerdict(categories=self._too_severe(result))

    def _too_severe(self, result: object) -> dict[str, int]:
        """The categories above the threshold.

        Raises:
            ModerationFailedError: a category has no severity, or one that no severity is.
        """
        severities: dict[str, int] = {}
        for entry in _member(result, "categoriesAnalysis", list):
            name, severity = _member(entry, "category", str), _member(entry, "severity", int)
            if not 0 <= severity <= MAX_SEVERITY or isinstance(severity, bool):
                raise ModerationFailedError("content safety answered with a severity that is none")
            severities[name] = max(severity, severities.get(name, 0))
        if missing := [name for name in CATEGORIES if name not in severities]:
            raise ModerationFailedError(f"content safety said nothing about {', '.join(missing)}")
        return {name: severity for name, severity in severities.items() if severity > self._settings.threshold}


def _member(value: object, name: str, kind: type) -> Any:
    """A member of the answer as it was on the wire; the SDK's own classes turn what they do not expect into other things."""
    found = value.get(name) if isinstance(value, Mapping) else None
    if not isinstance(found, kind):
        raise ModerationFailedError(f"content safety answered without a proper {name}")
    return found
