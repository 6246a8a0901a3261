#!/usr/bin/env python3
"""Writes the tables and plots of measured figures into the docs, from the files in benchmarks/results; `--check` only compares.

A table stands between `<!-- figures: NAME -->` and `<!-- end -->`. A figure that no file holds is one that nobody measured.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
TABLE = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def read(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((RESULTS / name).read_text())
    return loaded


def markdown(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    head = list(header)
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *([str(cell) for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def inflight() -> str:
    result = read("inflight-demo.json")
    steps = ("10", "20", "30", "50")
    rows = []
    for row in result["rows"]:
        means = [f"{row['latency_s_by_steps'][n]['mean']:.2f}" for n in steps]
        rows.append([f"{row['policy']}, load {row['load']:g}", *means, f"{row['latency_s']['p95']:.2f}", row["images_per_s"]])
    table = markdown(["", *(f"{n} steps" for n in steps), "p95, all", "images/s"], rows)
    capacity = ", ".join(f"{name} {value:.1f}" for name, value in result["capacity_images_per_s"].items())
    share = max(row["loop_share"] for row in result["rows"] if row["policy"] == "in-flight")
    about = f"{result['num_requests']} requests a run, {result['max_slots']} slots, {result['device']}, {result['dtype']}"
    return (
        f"Capacity in images/s with everything queued at once: {capacity}.\n"
        f"Mean latency in seconds by number of steps ({about}):\n\n"
        f"{table}\nThe loop around the engine takes {100 * share:.1f} % of the engine's time.\n"
    )


def savings() -> str:
    result = read("savings-demo-cpu.json")
    names = [name for name in result["rows"][0]["times_faster"] if name != "diffusers"]
    rows = [
        [row["guided_samples"], row["diffusers_ms"], *(f"{row['times_faster'][name]:.2f}" for name in names)]
        for row in result["rows"]
    ]
    header = ["guided samples", "diffusers, ms", *(name.replace("_", " ") for name in names)]
    return f"Times faster than diffusers' own forward ({result['device']}, {result['dtype']}):\n\n{markdown(header, rows)}"


def scheduler() -> str:
    rows = read("scheduler-cost.json")["rows"]
    cells = [
        [f"{row['num_slots']} slots, {row['num_waiting']} wait", row["turn_us"]["median"], row["turn_us"]["p99"]]
        for row in rows
    ]
    return f"`plan` and `advance` together, in microseconds:\n\n{markdown(['', 'median', 'p99'], cells)}"


def host_cost() -> str:
    result = read("host-cost.json")
    cells = [[row["num_samples"], row["cpu_ms"]["median"], row["cpu_ms"]["least"]] for row in result["rows"]]
    table = markdown(["guided samples", "median", "least"], cells)
    about = f"median and least of {result['runs']} runs of {result['turns']} turns on one core, {result['device']}"
    return f"Milliseconds of processor time a turn ({about}):\n\n{table}"


def batch() -> str:
    result = read("batch-share.json")
    rows = {(row["has_buckets"], row["rate"], row["flood"]): row for row in result["rows"]}
    cells = []
    for has_buckets, rate in dict.fromkeys((row["has_buckets"], row["rate"]) for row in result["rows"]):
        floods = [rows[has_buckets, rate, flood] for flood in (None, "low", "batch")]
        seen = [f"{row['p50_s']:.2f} / {row['p95_s']:.2f}" for row in floods]
        per_s = [f"{row['batch_per_s']:.2f}" for row in floods[1:]]
        cells.append([f"{rate:g}/s{', buckets' if has_buckets else ''}", *seen, *per_s])
    header = ["requests", "none", "low", "batch", "images/s of the flood, low", "batch"]
    about = (
        f"{result['num_slots']} slots, {result['seconds']:g} s of virtual time, a turn of n images takes "
        f"{1e3 * result['turn_s']:g} + {1e3 * result['image_s']:g} n ms, `batch_share` {result['batch_share']:g}"
    )
    return (
        f"Latency of the other requests, p50 / p95 in seconds, by the flood's priority ({about}):\n\n{markdown(header, cells)}"
    )


def batch_job() -> str:
    result = read("batch-job.json")
    kills, million = result["kills"], result["million"]
    cells = [
        [f"rows of a job that was killed {kills['kills']} times", f"{kills['rows']:,}"],
        ["rows in its index, lines, files", f"{kills['rows_in_index']:,}, {kills['lines_in_index']:,}, {kills['files']:,}"],
        ["pictures that are not what the index says", kills["wrong_pictures"]],
        [f"made again per kill ({kills['in_flight']} in flight)", kills["made_again_per_kill"]],
        [f"seconds until the first picture, {million['rows']:,} rows", million["first"]["seconds_to_first_picture"]],
        ["of a core, on a machine that others use too", million["first"]["cpu_seconds_to_first_picture"]],
        ["seconds until the first picture when the job goes on", million["again"]["seconds_to_first_picture"]],
        ["most memory, MiB", max(million["first"]["peak_mib"], million["again"]["peak_mib"])],
        ["journal, MiB", million["journal_mib"]],
    ]
    return markdown(["", result["device"]], cells)


def batch_interference() -> str:
    if not (RESULTS / "batch-interference.json").exists():
        return NOT_YET
    result = read("batch-interference.json")
    found = result["latency_s"]
    cells = [[f"{way} the flood", found[way]["p50"], found[way]["p95"]] for way in ("without", "with")]
    alone = result["flood_alone_per_s"]
    batch, normal = (sum(alone[name]) / len(alone[name]) for name in ("batch", "normal"))
    about = (
        f"{found['with']['count']} requests of {result['num_inference_steps']} steps each way, in {result['rounds']} rounds in "
        f"turn, {result['rate_per_s']:.2f} a second, {result['max_slots']} slots ({result['device']})"
    )
    return (
        f"Latency of the other requests in seconds; {about}:\n\n{markdown(['', 'p50', 'p95'], cells)}\n"
        f"The p95 is {result['p95_ratio']:.2f} times as long with the flood. When nobody else asks, batch requests make "
        f"{batch:.2f} images/s and normal requests {normal:.2f}.\n"
    )


def evaluate() -> str:
    result = read("evaluate-demo.json")
    names = ("right", "fd_safety_clip", "flagged")

    def cell(row: dict[str, Any], name: str) -> str:
        found = row["estimates"][name]
        value, low, high = (
            f"{found[key]:.0f}" if found["value"] > 1 else f"{found[key]:.2f}" for key in ("value", "low", "high")
        )
        return f"{value} ({low} to {high})"

    rows = [[f"{row['guidance_scale']:g}", *(cell(row, name) for name in names)] for row in result["rows"]]
    distance = next(metric for metric in result["metrics"] if metric["name"] == "fd_safety_clip")
    asked, bias = result["settings"], result["rows"][0]["estimates"]["fd_safety_clip"]["bias"]
    return (
        f"{result['num_prompts']} prompts, {asked['scheduler']}, {asked['num_inference_steps']} steps; {result['engine']}, "
        f"{result['dtype']}, {result['device']}; {result['num_reference']} reference pictures:\n\n"
        f"{markdown(['guidance scale', *names], rows)}\nSo few pictures make each distance too large by about {bias:.0f}. Two "
        f"halves of the reference, {distance['floor_pictures']} pictures each, are {distance['floor']:.0f} apart.\n"
    )


def front() -> str:
    result = read("front-cost.json")
    requests, steps = result["requests"], result["steps"]
    ways = ("echo", "front")
    latency = ["median latency, ms", *(requests["latency_ms"][way] for way in ways)]
    rate = [f"requests/s, {result['concurrency']} callers", *(requests["requests_per_s"][way] for way in ways)]
    names = {"callers_who_wait": "wait for their images", "callers_who_read_steps": "read every step"}
    cells = [[text, steps[name]["us_per_step"], f"{steps[name]['share_of_a_core']:.2f}"] for name, text in names.items()]
    size = f"{result['picture_bytes'] / 1000:.0f} KB"
    return (
        f"Engines that compute nothing, one image of {size} an answer, {result['cores']} cores for all processes "
        f"({result['device']}):\n\n{markdown(['', 'bare echo', 'front and replica'], [latency, rate])}\n"
        f"On a full server, {result['replicas']} replicas with {result['slots']} samples each and "
        f"{1e3 / result['turn_ms']:.0f} turns a second, the front's process takes:\n\n"
        f"{markdown(['callers who', 'µs for each step of a sample', 'of one core'], cells)}"
    )


def overload() -> str:
    result = read("overload-demo.json")
    able = result["capacity_per_s"]
    cells = [
        ["requests/s it can do, before and after", f"{able['before']}, {able['after']}"],
        ["requests/s offered", result["offered_per_s"]],
        ["pictures/s meanwhile", f"{result['goodput_per_s']} ({100 * result['goodput_of_capacity']:.0f} %)"],
        ["a refusal takes, median and p95", f"{result['refusal_ms']['median']} ms, {result['refusal_ms']['p95']} ms"],
        ["accepted and not in time", result["accepted_but_late"]],
        ["front, MiB, at the start and the end", ", ".join(str(result["memory_mib"][i]["front"]) for i in (0, -1))],
    ]
    for phase, busy in result.get("cores_busy", {}).items():
        what = f"cores busy {phase.replace('_', ' ')}: callers, front, replica"
        cells.append([what, ", ".join(f"{busy[name]:.2f}" for name in ("callers", "front", "replicas"))])
    about = f"{result['seconds']:g} s, deadline {result['timeout']:g} s, queue of at most {result['max_waiting_s']:g} s"
    return f"The built-in model on {result['cores']} cores, {about}:\n\n{markdown(['', ''], cells)}"


def engines() -> str:
    """A table for each machine that was measured in earnest."""
    found = [json.loads(file.read_text()) for file in sorted(RESULTS.glob("engines-*.json"))]
    tables = [_engines(result) for result in found if not result.get("is_quick", True)]
    return "\n".join(tables) or NOT_YET


def _engines(result: dict[str, Any]) -> str:
    cells = []
    for row in result["rows"]:
        if "median_s" not in row:
            what = f"{row['num_images']} images, {row['sampler']}" if "num_images" in row else ""
            cells.append(
                [row["row"].replace("_", " "), what, "not measured: " + " ".join(row["skipped"].split())[:120], *[""] * 6]
            )
            continue
        stages = row["stage_s"]
        num_steps = row["unet_calls_per_s"] * row["median_s"]  # of all images together
        cells.append(
            [
                f"{row['row'].replace('_', ' ')}, {row['dtype']}",
                f"{row['num_images']} × {row['num_inference_steps']} {row['sampler']}",
                f"{row['median_s']:.3f} ({row['min_s']:.3f}-{row['max_s']:.3f})",
                f"{row['images_per_s']:.2f}",
                f"{1000 * stages['denoise'] / num_steps:.2f}",
                ", ".join(f"{1000 * stages.get(name, 0):.0f}" for name in ("encode", "decode", "safety", "encode_image")),
                "-" if row["peak_memory_mib"] is None else row["peak_memory_mib"],
                f"{100 * row['share_of_matmul_peak']:.1f} %" if "share_of_matmul_peak" in row else "-",
                "-"
                if "max_levels_off" not in row
                else f"{row['max_levels_off']}" + (f", {row['psnr_db']} dB" if row["psnr_db"] else ""),
            ]
        )
    header = [
        "", "images × steps", "median s (least-most)", "images/s",
        "UNet, ms an image and step",
        "text, VAE, safety, PNG, ms", "MiB",
        "of matmul peak", "levels off FP32",
    ]  # fmt: skip
    peak = ", ".join(f"{value} TFLOP/s in {name}" for name, value in result["matmul_peak_tflops"].items())
    where = f"{result['model']} {result['width']}x{result['height']}, {result['device']}"
    about = f"{where}, matmul peak {peak}, commit {str(result['commit'])[:12]}"
    return f"{about}:\n\n{markdown(header, cells)}"


def engines_in_turn() -> str:
    file = RESULTS / "engines-in-turn-demo.json"
    if not file.exists():
        return NOT_YET
    result = json.loads(file.read_text())
    cells = []
    for row in result["rows"]:
        times = [f"{seconds:.3f} ({row['min_s'][name]:.3f})" for name, seconds in row["median_s"].items()]
        ratio = row["ratio"]
        cells.append([row["num_images"], *times, f"{ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})"])
    header = ["images at once", *(f"{name.replace('_', ' ')}, s (least)" for name in result["rows"][0]["median_s"]), "ratio"]
    about = (
        f"{result['num_inference_steps']} steps, medians of {result['rounds']} rounds, {result['device']}, load average "
        f"{result['load_average'][0]:.1f} before, commit {str(result['commit'])[:12]}"
    )
    return f"{about}:\n\n{markdown(header, cells)}"


def peers() -> str:
    file = RESULTS / "peers-demo.json"
    if not file.exists():
        return NOT_YET
    result = json.loads(file.read_text())
    parts = []
    for mix in result["mixes"]:
        cells = [_peer(name, mix, result) for name in result["systems"]]
        header = ["", "can do, requests/s", *(f"load {load:g}: in time, p50, p95 s" for load in PEER_LOADS), "pictures"]
        parts.append(f"`{mix}`:\n\n{markdown(header, cells)}\n")
    versions = ", ".join(f"{name} {version}" for name, version in result["peer_versions"].items())
    about = (
        f"{result['device']}, {result['seconds']:g} s a load, deadline {result['timeout']:g} s, "
        f"in time is within {result['goodput']:g} s, commit {str(result['commit'])[:12]}; {versions}"
    )
    plot = "![Share of the requests answered in time, by load](../../benchmarks/results/peers-demo.svg)"
    return f"{about}.\n\n{''.join(parts)}{plot}\n"


def _peer(name: str, mix: str, result: dict[str, Any]) -> list[object]:
    of_mix = [row for row in result["rows"] if row["system"] == name and row.get("mix", mix) == mix]
    able = [row for row in of_mix if row.get("load") == "capacity" and "skipped" not in row]
    if not able:
        why = next((row["skipped"] for row in of_mix if "skipped" in row), "no time left")
        return [name.replace("_", " "), f"not measured: {why[:120]}", "", "", "", ""]
    rows = {row.get("load"): row for row in of_mix}
    bounds = [bound for row in able for bound in row["intervals"].get("requests_per_s", ()) if bound is not None]
    spread = f" ({min(bounds):.1f}-{max(bounds):.1f})" if bounds and "unlocked" not in name else ""
    cells = [name.replace("_", " "), f"{mean([row['requests_per_s'] for row in able]):.1f}{spread}"]
    for load in PEER_LOADS:
        row = rows.get(load)
        if row is None or "skipped" in row:
            cells.append("-" if row is None else row["skipped"])
            continue
        times = row["total_s"]
        said = "none" if times is None else f"{times['p50']:.2f}, {times['p95']:.2f}"
        cells.append(f"{100 * row['goodput']['share']:.0f} %, {said}")
    checks = [row["check"] for row in of_mix if "check" in row]
    wrong, num = sum(one["num_wrong"] for one in checks), sum(one["num_checked"] for one in checks)
    return [*cells, f"**{wrong} of {num} wrong**" if wrong else f"{num} checked, right"]


def peers_plot() -> str:
    """The share in time by load, as an SVG beside its file; empty while there are no figures."""
    if not (RESULTS / "peers-demo.json").exists():
        return ""
    from matplotlib.figure import Figure

    from mii_serve.bench.plots import to_svg

    result = read("peers-demo.json")
    mix = "mixed" if "mixed" in result["mixes"] else next(iter(result["mixes"]))
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for name in result["systems"]:
        rows = {row.get("load"): row for row in result["rows"] if row["system"] == name and row.get("mix") == mix}
        shares = {f"{load:g}": 100 * rows[load]["goodput"]["share"] for load in PEER_LOADS if rows.get(load, {}).get("goodput")}
        if shares:
            axes.plot(list(shares), list(shares.values()), marker="o", label=name.replace("_", " "))
    axes.set(
        title=f"Answered within {result['goodput']:g} s, mix {mix}",
        xlabel="requests/s offered, as a share of what mii_serve can do",
        ylabel="% of all requests",
        ylim=(0, None),
    )
    axes.grid(alpha=0.3)
    axes.legend()
    return to_svg(figure)


def threads() -> str:
    result = read("threads.json")
    alone, beside = "alone", "beside_busy_processes"
    cells = [
        [row["setting"], row[alone]["median_ms"], row[alone]["min_ms"], row[beside]["median_ms"], row[beside]["min_ms"]]
        for row in result["rows"]
    ]
    about = f"{result['guided_samples']} guided samples, {result['device']}, beside {result['busy_processes']} busy processes"
    header = ["", "alone, median", "least", "beside them, median", "least"]
    return f"Milliseconds a turn ({about}):\n\n{markdown(header, cells)}"


def provenance() -> str:
    result = read("provenance.json")
    costs, marks = result["costs"], result["costs"]["watermark"]
    kinds = ("nothing", "xmp", "xmp_and_c2pa")
    cells = [
        [kind.upper(), *(costs[kind][f"{name}_ms"] for name in kinds), *(costs[kind][f"{name}_bytes"] for name in kinds)]
        for kind in ("png", "jpeg", "webp")
    ]
    header = ["", "ms, no marks", "XMP", "XMP and C2PA", "bytes, no marks", "XMP", "XMP and C2PA"]
    side = result["size_px"]
    return (
        f"Median processor time to write a {side} x {side} picture, and its size ({result['device']}):\n\n"
        f"{markdown(header, cells)}\n"
        f"To put the watermark in takes {marks['embed_ms']} ms, to look for it {marks['read_ms']} ms.\n"
    )


def watermark() -> str:
    result = read("provenance.json")
    files = {"unmarked": "never marked", "png": "PNG", "jpeg_95": "JPEG 95", "jpeg_80": "JPEG 80", "webp_90": "WebP 90"}
    cells = [
        [
            row["pictures"],
            row["count"],
            row["mean_change"],
            *(f"{row[name]['found']} ({row[name]['median_share']})" for name in files),
        ]
        for row in result["watermark"]
    ]
    package = result["package"]
    shares = ", ".join(f"{name.replace('_', ' ')} {package[name]['median']}" for name in package if name != "package_embed_ms")
    header = ["cuts of", "pictures", "mean change of 255", *files.values()]
    return (
        "In how many pictures the watermark is found, and the median share of its bits that match (0.5 is chance):\n\n"
        f"{markdown(header, cells)}\n"
        f"Beside the package invisible-watermark, median share of the bits: {shares}.\n"
    )


def start() -> str:
    result = read("start-demo.json")
    names = ("process", "imports", "load", "warm_up")
    phases = [[name.replace("_", "-"), _spread(result["phases_of_a_replica"][name])] for name in names]
    with_one, without = result["with_a_spare"], result["without_a_spare"]
    outside = [
        [text, *(_spread(seen[name]) for seen in (without, with_one))]
        for text, name in (
            ("command to open address", "until_listening"),
            ("command to ready line", "until_ready"),
            ("replica killed to next picture", "from_kill_to_picture"),
        )
    ]
    memory = result["memory_of_a_spare"]
    return (
        f"Seconds, median of {result['repeats']} (least-most), {result['device']}:\n\n"
        f"{markdown(['a replica by itself', 's'], phases)}\n"
        f"{markdown(['a deployment', 'without a spare', 'with one'], outside)}\n"
        f"A spare has {memory['unique_mib']} MiB for itself, {memory['proportional_mib']} MiB with a share of what is shared.\n"
    )


def ray_proxy() -> str:
    if not (RESULTS / "ray-proxy.json").exists():
        return NOT_YET
    result = read("ray-proxy.json")
    rows = [
        ("image call of one step, median ms (least-p95)", "image_ms"),
        ("call that computes nothing, median ms (least-p95)", "info_ms"),
        (f"stream, ms for each of {result['steps']} steps, median (least-p95)", "stream_ms_per_step"),
    ]
    cells = []
    for text, name in rows:
        direct, proxied = (result[name][way] for way in ("direct", "proxied"))
        ratio = f"{proxied['median'] / direct['median']:.2f}"
        cells.append([text, *(f"{one['median']} ({one['min']}-{one['p95']})" for one in (direct, proxied)), ratio])
    rates = [result["images_per_s"][way] for way in ("direct", "proxied")]
    cells.append([f"images/s, {result['callers']} callers", *rates, f"{rates[1] / rates[0]:.2f}"])
    return f"{result['device']}:\n\n{markdown(['', 'own port', 'through the proxy', 'ratio'], cells)}"


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


def _spread(seen: dict[str, float]) -> str:
    return f"{seen['median_s']:.2f} ({seen['min_s']:.2f}-{seen['max_s']:.2f})"


NOT_YET = "Not measured in earnest yet.\n"
PEER_LOADS = (0.5, 0.85, 1.2)
PLOTS: dict[str, Callable[[], str]] = {"peers-demo.svg": peers_plot}
TABLES: dict[str, Callable[[], str]] = {
    table.__name__: table
    for table in (
        inflight,
        savings,
        scheduler,
        host_cost,
        batch,
        batch_interference,
        batch_job,
        evaluate,
        front,
        overload,
        engines,
        engines_in_turn,
        peers,
        threads,
        start,
        ray_proxy,
        ranks,
        ranks_computed,
        roofline,
        kernel_times,
        gpu_tests,
        kernel_resources,
        provenance,
        watermark,
    )
}


def published(text: str) -> str:
    """The page with its tables as the files have them."""
    return TABLE.sub(lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n{found[3]}", text)


def main() -> int:
    is_check, stale = "--check" in sys.argv[1:], []
    for page in PAGES:
        text = page.read_text()
        if (new := published(text)) != text:
            stale.append(str(page.relative_to(ROOT)))
            if not is_check:
                page.write_text(new)
    for name, plot in PLOTS.items():
        file, drawn = RESULTS / name, plot()
        if drawn and (not file.exists() or file.read_text() != drawn):
            stale.append(str(file.relative_to(ROOT)))
            if not is_check:
                file.write_text(drawn)
    print("\n".join(stale) or "all figures are those of the files")
    return int(is_check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
