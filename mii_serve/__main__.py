"""`python -m mii_serve` is the `mii_serve` command.

Python has put the current folder on the import path by then. It is taken off before anything else is imported, see
`safe_path.py`; only where this package itself was found there it stays, as the last place to look.
"""

import os
import sys

_ROOT = __file__.removesuffix(f"{os.sep}mii_serve{os.sep}__main__.py")


def _leave_current_folder() -> None:
    if sys.flags.safe_path:
        return
    current = sys.path.pop(0)
    if current == _ROOT and _ROOT not in sys.path:
        sys.path.append(_ROOT)
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), _ROOT)))


if __name__ == "__main__":
    _leave_current_folder()
    from mii_serve.cli import main

    main()
