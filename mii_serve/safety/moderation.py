"""Moderation as the server sees it: a moderator checks texts and pictures, and either gives a verdict or fails.

A failure is not a verdict: the server lets nothing pass that was not found harmless. `safety/azure.py` has the one moderator.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class ModerationVerdict:
    """`categories` has the severities that are above the threshold; empty where there are none."""

    categories: Mapping[str, int] = field(default_factory=dict)
    on_blocklist: bool = False

    @property
    def is_blocked(self) -> bool:
        return bool(self.categories) or self.on_blocklist


class Moderator(Protocol):
    """Gives verdicts, each within a time of its own."""

    async def check_texts(self, prompt: str, negative_prompt: str) -> None:
        """Check both concurrently.

        Raises:
            ContentBlockedError: one of them is to be refused.
            ModerationFailedError: there is no verdict on one of them.
        """

    async def check_image(self, image: bytes) -> ModerationVerdict:
        """Check a picture in a format and size the service takes; see `safety/pictures.py`.

        Raises:
            ModerationFailedError: there is no verdict.
        """

    async def close(self) -> None:
        """Release connections; no check is made afterwards."""
