"""Run as a file of its own: what deepspeed-mii's own classes say of the settings on stdin.

The last line of stdout is null, or the first problem as JSON. It is a process of its own because importing mii takes seconds,
and torch and deepspeed with it.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def main() -> None:
    given: dict[str, Any] = json.load(sys.stdin)
    from mii.legacy.config import MIIConfig, ModelConfig
    from pydantic import ValidationError

    outer = {name: value for name, value in given.items() if name in MIIConfig.model_fields and name != "model_conf"}
    inner = {name: value for name, value in given.items() if name not in outer}
    problem = None
    try:
        # True, because otherwise MII reads a pickle that every user can write, and lists all models of the hub.
        MIIConfig(**outer, model_conf=ModelConfig(**{**inner, "skip_model_check": True}))
    except ValidationError as error:
        first = error.errors()[0]
        problem = {"setting": ".".join(map(str, first["loc"])) or "mii_config", "rule": first["msg"]}
    print("\n" + json.dumps(problem))  # noqa: T201 - deepspeed writes to stdout, too


if __name__ == "__main__":
    main()
