"""On the operator's PYTHONPATH, which replicas keep to: a replica process with everything but a model, and no torch.

Python runs this in each process when it starts; in others than replicas it does nothing.
"""

import sys

if "mii_serve.replica.process" in sys.orig_argv:
    from timed_engine import TimedEngine

    from mii_serve.models import deferred
    from mii_serve.replica import local

    deferred.import_for_drawing = lambda *_: None
    local.build_warm_engine = lambda _: TimedEngine()
