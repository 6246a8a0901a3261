"""MII's client of ours refuses what it cannot send, before it sends anything."""

from __future__ import annotations

import pytest

from mii_serve.compat.mii import MIIClient
from mii_serve.errors import ConfigError, InvalidRequestError


def test_a_request_may_have_prompts_and_negative_prompts_only():
    client = MIIClient()
    with pytest.raises(InvalidRequestError, match="'steps'"):
        client.query({"prompt": "a", "steps": 3})
    client.close()


def test_another_task_is_refused():
    with pytest.raises(ConfigError, match="text-to-image"):
        MIIClient("text-generation")
