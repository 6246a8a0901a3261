"""The table of metrics and the code list the same."""

from __future__ import annotations

import re
from pathlib import Path

from mii_serve.metrics import FrontMetrics, ReplicaMetrics

PAGE = Path(__file__).parent.parent.parent / "docs" / "architecture" / "06-metrics.md"


def test_the_page_lists_every_metric_with_its_type():
    families = [*FrontMetrics().registry.collect(), *ReplicaMetrics().registry.collect()]
    made = {(family.name + ("_total" if family.type == "counter" else ""), family.type) for family in families}
    listed = set(re.findall(r"^\| `(\w+)` \| (\w+) \|", PAGE.read_text(), re.MULTILINE))
    assert listed == made
