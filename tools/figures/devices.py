"""Tables of ranks and of the GPU path, traced, computed or measured."""

from __future__ import annotations

import json
from typing import Any

from figures.files import NOT_YET, RESULTS, markdown, read


def ranks() -> str:
    """A table for each file: what was measured."""
    return "\n".join(_ranks(json.loads(file.read_text())) for file in sorted(RESULTS.glob("ranks-*.json"))) or NOT_YET


def _ranks(result: dict[str, Any]) -> str:
    num_ranks, modes = result["num_ranks"], list(result["memory_mib_per_rank"])
    of_mode = {mode: mode if mode == "one rank" else f"{mode} {num_ranks}" for mode in modes}
    rows = {(row["samples"], row["mode"]): row for row in result["rows"]}
    cells = []
    for samples in dict.fromkeys(row["samples"] for row in result["rows"]):
        seen = [rows[samples, mode] for mode in modes]
        times = [f"{row['ms_per_call']['median']:.1f} ({row['ms_per_call']['min']:.1f})" for row in seen]
        cells.append([samples, *times, *(_sent(row) for row in seen if row["mode"] != "one rank")])
    header = ["guided samples", *(f"{of_mode[mode]}, ms" for mode in modes)]
    header += [f"{of_mode[mode]} sends" for mode in modes if mode != "one rank"]
    held = "; ".join(f"{of_mode[mode]} {', '.join(map(str, each))}" for mode, each in result["memory_mib_per_rank"].items())
    skipped = "".join(f"{mode} was not measured: {why}\n\n" for mode, why in result["skipped"].items())
    about = f"`{result['model']}` {result['width']}x{result['height']}, {result['dtype']}, {result['device']}"
    return (
        f"Milliseconds a UNet call, median (least), {about}, load average {result['load_average'][0]:.1f} before, "
        f"commit {str(result['commit'])[:12]}:\n\n"
        f"{markdown(header, cells)}\n{skipped}Memory of each rank in MiB, the {result['memory_is']}: {held}.\n"
    )


def _sent(row: dict[str, Any]) -> str:
    if row["collectives_per_call"] is None:
        return "not counted"
    return f"{row['collectives_per_call']:g} × {row['sent_bytes_per_call'] / row['collectives_per_call'] / 1024:.1f} KiB"


def ranks_computed() -> str:
    """What follows from the shares and from the UNet's configuration alone."""
    from mii_serve.engine.kernels.sharded_traffic import traffic_of_call
    from mii_serve.engine.kernels.shares import shares
    from mii_serve.models.families import SD_V1_4

    cells = []
    for num_samples in (1, 2, 4, 8):
        row: list[object] = [num_samples]
        for num_ranks in (2, 4):
            largest = max(len(share.rows) for share in shares(num_samples, 2 * num_samples, num_ranks))
            row += [f"{largest} of {2 * num_samples}", f"1 × {32 * largest} KiB"]
        sums = traffic_of_call(
            SD_V1_4.unet, num_samples=num_samples, num_rows=2 * num_samples, height=64, width=64, bytes_per_value=2
        )
        cells.append([*row, f"{sums.num_all_reduces}, {sums.num_bytes / 1e6:.1f} MB"])
    of_rows = [text for n in (2, 4) for text in (f"`rows` {n}: rows on a rank, at most", f"each rank sends, `rows` {n}")]
    return markdown(["guided samples", *of_rows, "each rank sums, `tensor`"], cells)


def loras() -> str:
    """The cost of different LoRAs in one batch, computed and measured."""
    if not (RESULTS / "lora.json").is_file():
        return NOT_YET
    result = read("lora.json")
    traced, timed = result["computed"], result["measured"]
    cells = [
        [f"{device}, bound on a turn, ms", *traced["bound_ms"][device], f"{100 * cost:.0f} %"]
        for device, cost in traced["cost"].items()
    ]
    for name, what in (("kernels", "kernels"), ("gflop", "Gflop"), ("gb", "GB read and written")):
        before, after = traced[name]
        cells.append([what, before, after, f"{100 * (after / before - 1):.0f} %"])
    median, least, most = (100 * one for one in timed["cost"])
    side = 8 * timed["latents"][0]
    cells.append(
        [
            f"measured on a CPU, `{timed['model']}` {side}x{side}, s a UNet call",
            timed["call_s"]["none"],
            timed["call_s"]["loras"],
            f"{median:.0f} % ({least:.0f} to {most:.0f})",
        ]
    )
    num, rank = result["num_samples"], result["rank"]
    about = (
        f"{num} guided samples, {num} different LoRAs of rank {rank}; commit {str(result['commit'])[:12]}, {result['device']}"
    )
    return f"{about}:\n\n{markdown(['', 'none', 'LoRAs', 'more'], cells)}"


def roofline() -> str:
    result = read("roofline.json")
    tables = []
    titles = {"turn": "A turn", "decode": "The VAE, one picture", "unsteady": "native, turns that are not steady"}
    for what, title in titles.items():
        rows = [row for row in result["rows"] if row["what"] == what]
        cells = [
            [
                row["row"],
                row["num_samples"],
                row["kernels"],
                f"{row['gflop']:.0f}",
                f"{row['gb']:.2f}",
                row["layout_conversions"],
                f"{row['peak_activations_gib']:.2f}",
                *(f"{value:.1f}" for value in row["bound_ms"].values()),
            ]
            for row in rows
        ]
        devices = [f"{device}, ms" for device in rows[0]["bound_ms"]]
        header = [title, "samples", "kernels", "GFLOP", "GB", "layout conversions", "activations, GiB", *devices]
        tables.append(markdown(header, cells))
    return f"v1-4, 512x512, fp16; torch {result['versions']['torch']}, traced and computed:\n\n" + "\n".join(tables)


def kernel_resources() -> str:
    result = read("kernel-resources.json")
    cells: dict[tuple[str, str], list[str]] = {}
    for row in result["rows"]:
        about = {"kernel", "capability", "warps", "registers", "spilled_bytes", "shared_bytes"}
        tile = ", ".join(f"{name} {value}" for name, value in row.items() if name not in about)
        key = f"`{row['kernel']}`", f"{tile}; {row['warps']} warps"
        taken = f"{row['registers']}, {row['spilled_bytes']}, {row['shared_bytes'] / 1024:.0f}"
        cells.setdefault(key, list(key)).append(taken)
    header = ["", "tile", *(f"{about}: registers, spilled bytes, shared KiB" for about in ("8.0", "9.0"))]
    return f"triton {result['versions']['triton']}, compiled, not run:\n\n{markdown(header, cells.values())}"


def kernel_times() -> str:
    """A table for each GPU that was measured."""
    tables = []
    for file in sorted(RESULTS.glob("kernel-times-*.json")):
        result = json.loads(file.read_text())
        cells = []
        for row in result["measurements"]:
            ways = sorted(row["ms"].items(), key=lambda way: way[1])
            shape = "×".join(map(str, (row["size"], *row["shape"])))
            cells.append([f"`{row['operation']}` {shape}", ", ".join(f"{way} {1000 * ms:.1f}" for way, ms in ways)])
        refused = "".join(f"Not {what}: {why}.\n" for what, why in result["refused"].items())
        whole = [
            [one["what"], one["num_samples"], *(f"{one['ms'][way]:.2f} ({one['first_s'][way]:.1f})" for way in one["ms"])]
            for one in result["calls"]
        ]
        if whole:
            header = ["", "samples", *(f"{way}, ms (first call, s)" for way in result["calls"][0]["ms"])]
            tables.append(f"{result['device']}, measured:\n\n{markdown(header, whole)}")
        tables.append(f"{result['device']}, measured:\n\n{markdown(['shape', 'µs, the fastest first'], cells)}\n{refused}")
    return "\n".join(tables) or NOT_YET


def gpu_tests() -> str:
    """What the tests on each GPU found."""
    lines = []
    for file in sorted(RESULTS.glob("gpu-tests-*.json")):
        result = json.loads(file.read_text())
        outcomes = [row["outcome"] for row in result["tests"].values()]
        counts = ", ".join(f"{outcomes.count(outcome)} {outcome}" for outcome in dict.fromkeys(outcomes))
        lines.append(f"{result['device']}, commit {str(result['commit'])[:12]}: {counts}.\n")
        lines += [f"- {row['outcome']}: `{name}`\n" for name, row in result["tests"].items() if row["outcome"] == "failed"]
    return "".join(lines) or NOT_YET
