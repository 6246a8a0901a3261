"""Tables of the scheduler, the batched engine and batch jobs."""

from __future__ import annotations

from typing import Any

from figures.files import NOT_YET, RESULTS, markdown, read


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
        f"The p95 is {result['p95_ratio']:.2f} times as long with the flood. Without other requests, batch requests make "
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
