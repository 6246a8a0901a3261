"""No Python of this project imports what lies in the folder it happens to be started in.

`python -m` and `python -c` put the current folder first on the import path, so a `json.py` beside a model's weights would run.
`PYTHONSAFEPATH` keeps it off, in a process and in those that it starts in turn. The operator's `PYTHONPATH` stays in force.
"""

from __future__ import annotations

from collections.abc import Mapping

SAFE_PATH = "PYTHONSAFEPATH"


def safe_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment for a Python process that is started from here."""
    return {**environment, SAFE_PATH: "1"}
