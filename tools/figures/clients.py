"""The table of other people's clients."""

from __future__ import annotations

from figures.files import read


def clients() -> str:
    lines = ["| client | version | works | does not, and why |", "|---|---|---|---|"]
    for name, seen in read("clients.json").items():
        limits = "; ".join([*(f"{what}: {why}" for what, why in seen["limits"].items()), *seen["lacks"]])
        lines.append(f"| {name} | {seen['version']} | {', '.join(seen['works'])} | {limits} |")
    return "\n".join(lines) + "\n"
