"""Tables of whole servers: engines and peers side by side, the front, starts, marks."""

from __future__ import annotations

import json
from statistics import mean
from typing import Any

from figures.files import NOT_YET, RESULTS, markdown, read

PEER_LOADS = (0.5, 0.85, 1.2)


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
    plot = "![Share of the requests answered in time, by load](../../benchmarks/results/peers-demo.svg)"
    return f"{text}{plot}\n" if (text := _peers("peers-demo.json")) else NOT_YET


def peers_in_turn() -> str:
    text = _peers("peers-demo-in-turn.json")
    return f"{text.rstrip()}\n" if text else NOT_YET


def _peers(name: str) -> str:
    """Empty where there is no such file."""
    file = RESULTS / name
    if not file.exists():
        return ""
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
    return f"{about}.\n\n{''.join(parts)}"


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


def _spread(seen: dict[str, float]) -> str:
    return f"{seen['median_s']:.2f} ({seen['min_s']:.2f}-{seen['max_s']:.2f})"
