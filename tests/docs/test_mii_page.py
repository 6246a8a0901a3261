"""The page on DeepSpeed-MII says of every setting and kwarg what the code does."""

from __future__ import annotations

import re
from pathlib import Path

from mii_serve.compat.mii_config import Ignored, Taken, fates
from mii_serve.proto.mii_codec import MAX_PICTURES_PER_CALL, MAX_REPLY_BYTES, MII_KWARGS
from mii_serve.types import PARAMETER_NAMES

PAGE = (Path(__file__).parents[2] / "docs" / "architecture" / "09-mii.md").read_text()


def test_the_table_of_settings_is_the_codes():
    listed = re.findall(r"^\| `(\w+)` \| (taken|ignored|refused) \| (.*) \|$", PAGE, re.MULTILINE)
    made = [
        (name, "taken", fate.as_)
        if isinstance(fate, Taken)
        else (name, "ignored" if isinstance(fate, Ignored) else "refused", fate.why)
        for name, fate in fates().items()
    ]
    assert listed == made


def test_every_parameter_but_the_prompt_is_a_kwarg():
    assert "| `query_kwargs` | every [parameter](14-parameters.md) but `prompt`; " in PAGE
    assert set(MII_KWARGS) == set(PARAMETER_NAMES) - {"prompt"}


def test_the_bounds_are_the_codes():
    assert f"{MAX_PICTURES_PER_CALL} pictures" in PAGE
    assert f"{MAX_REPLY_BYTES // (1024 * 1024 * 3)} pictures of 1024 × 1024" in PAGE
