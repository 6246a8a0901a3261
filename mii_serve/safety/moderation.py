"""Content safety as the server sees it: somebody who looks at texts and pictures, and either gives a verdict or fails.

A failure is never a verdict: whoever asks lets nothing pass that was not found harmless. Which service answers is
`safety/azure.py`'s business.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """`categories` has the severities that are above the threshold; empty where there are none."""

    categories: Mapping[str, int] = field(default_factory=dict)
    on_blocklist: bool = False

    @property
    def is_blocked(self) -> bool:
        return bool(self.categories) or self.on_blocklist


class Moderator(Protocol):
    """Gives verdicts, each within a time of its own."""

    async def check_texts(self, prompt: str, negative_prompt: str) -> None:
        """Look at both, at once.

        Raises:
            ContentBlockedError: one is to be refused.
            ModerationFailedError: there is no verdict on one of them.
        """

    async def check_image(self, image: bytes) -> Verdict:
        """Look at a picture in a format and size the service takes; see `safety/pictures.py`.

        Raises:
            ModerationFailedError: there is no verdict.
        """

    async def close(self) -> None:
        """Let go of what is held; no verdict is asked for afterwards."""
