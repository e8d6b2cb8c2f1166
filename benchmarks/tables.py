"""Write the tables of benchmarks/README.md from the records: ``python benchmarks/tables.py``.

A table is of one command's rows, the newest on that device in that dtype and shape: ratios are of what ran side by
side.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from loss import PLAIN, REFERENCE
from step import AVATARL, CROSS_ENTROPY, FLOOR, MATMUL, PART
from timing import HERE, RESULTS, read

Row = dict[str, str]
README = HERE / "README.md"


def newest(rows: Iterable[Row], *columns: str) -> list[list[Row]]:
    """Rows grouped by columns, of each group the newest command's."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[column] for column in columns), []).append(row)
    return [[row for row in group if row["date"] == group[-1]["date"]] for group in groups.values()]


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def caption(rows: list[Row], shape: str) -> str:
    """What ran where, when, with what."""
    row = rows[0]
    versions = f"torch {row['torch']}" + (f", triton {row['triton']}" if row["triton"] else "")
    device = f"{row['device']}, {row['threads']} threads"
    return f"**{shape}**: {device}, {versions}, revision {row['revision']}, {row['date'][:10]}"


def number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 99.5 else f"{value:.3g}"


def ratio(row: Row, other: Row | None, column: str = "median_ms") -> str:
    """One alternative's figure as a multiple of another's."""
    return f"{float(row[column]) / float(other[column]):.2f} ×" if other and row[column] and other[column] else ""


def milliseconds(row: Row) -> str:
    """Median and percentiles, or why there are none."""
    if not row["median_ms"]:
        return row["note"]
    if int(row["n"]) < 5:  # too few for percentiles
        return number(float(row["median_ms"]))
    return f"{number(float(row['median_ms']))} ({number(float(row['p20_ms']))}–{number(float(row['p80_ms']))})"


def mebibytes(row: Row) -> str:
    return number(float(row["peak_mib"])) if row["peak_mib"] else ""


def by_name(rows: Iterable[Row]) -> dict[str, Row]:
    return {row["alternative"]: row for row in rows}


# --- the tables ------------------------------------------------------------------------------------------------------

SHAPE = ("positions", "vocabulary", "width", "critic_width", "top_k")


def loss_tables(rows: list[Row]) -> str:
    """Every alternative, against PyTorch's cross-entropy and against the plain composition."""
    header = ["forward and backward", "ms (20–80 %)", f"/ {REFERENCE}", f"/ {PLAIN}", "peak MiB", "MiB / plain", "n"]
    tables = []
    for group in newest((row for row in rows if row["table"] != "sweep"), "device", "threads", "dtype", *SHAPE):
        found = by_name(group)
        reference, plain = found.get(REFERENCE), found.get(PLAIN)
        lines = [
            [
                f"{name} ({row['note']})" if row["note"] and row["median_ms"] else name,
                milliseconds(row),
                ratio(row, reference),
                ratio(row, plain),
                mebibytes(row),
                ratio(row, plain, "peak_mib"),
                row["n"],
            ]
            for name, row in found.items()
        ]
        n, v, d, critic_d, k = (f"{int(group[0][column]):,}" for column in SHAPE)
        shape = f"N = {n}, V = {v}, d = {d}, d_c = {critic_d}, K = {k}, {group[0]['dtype']}"
        tables += [caption(group, shape), markdown(header, lines)]
    return "\n\n".join(tables)


def sweep_tables(rows: list[Row]) -> str:
    """One shape a line, one alternative a column."""
    tables = []
    for group in newest((row for row in rows if row["table"] == "sweep"), "device", "threads", "dtype"):
        names = [name for name, row in by_name(group).items() if row["median_ms"]]
        lines = []
        for points in newest(group, *SHAPE):
            found = by_name(points)
            cells = [f"{milliseconds(found[name])}, {mebibytes(found[name]) or '?'} MiB" for name in names]
            lines.append([*(f"{int(points[0][column]):,}" for column in SHAPE), *cells])
        tables += [caption(group, group[0]["dtype"]), markdown(["N", "V", "d", "d_c", "K", *names], lines)]
    return "\n\n".join(tables)


STEP = ("player", "critic", "vocabulary", "block_size", "micro_batch_size", "optimiser", "dtype", "compile", "impl")


def step_tables(rows: list[Row]) -> str:
    """Whole steps with their speed and utilisation, then the parts of AvataRL's."""
    header = ["step", "ms (20–80 %)", "tokens/s", f"/ {CROSS_ENTROPY}", f"/ {FLOOR}"]
    header += ["player's FLOPs, of peak", "critic's", "peak MiB", "n"]
    tables = []
    for group in newest(rows, "device", "threads", *STEP):
        found = by_name(group)
        product = found[MATMUL]
        peak = float(product["gflop"]) / float(product["p20_ms"])  # TFLOP/s
        tokens = int(group[0]["block_size"]) * int(group[0]["micro_batch_size"])
        lines = []
        for name, row in found.items():
            if name.startswith(PART) or name == MATMUL or not row["median_ms"]:
                continue
            median, critic = float(row["median_ms"]), float(row["critic_gflop"])
            utilisation = [(float(row["gflop"]) - critic) / median / peak, critic / median / peak]
            speed = number(1e3 * tokens / median)
            ratios = [ratio(row, found[CROSS_ENTROPY]), ratio(row, found[FLOOR])]
            shares = [f"{share:.1%}" if share else "" for share in utilisation]
            lines.append([name, milliseconds(row), speed, *ratios, *shares, mebibytes(row), row["n"]])
        row = group[0]
        shape = (
            f"player {row['player']}, critic {row['critic']}, V = {int(row['vocabulary']):,}, "
            f"{row['micro_batch_size']} windows of {row['block_size']}, {row['optimiser']}, {row['dtype']}, "
            f"loss {row['impl']}"
            f"{', torch.compile' if row['compile'] == 'True' else ''}"
        )
        tables += [caption(group, shape), markdown(header, lines), parts_line(found, peak)]
    return "\n\n".join(tables)


def parts_line(found: dict[str, Row], peak: float) -> str:
    """Where the time of AvataRL's step goes."""
    times = {name: float(row["median_ms"]) for name, row in found.items() if row["median_ms"]}
    if AVATARL not in times:
        return ""
    shares = {name.removeprefix(PART): time / times[AVATARL] for name, time in times.items() if name.startswith(PART)}
    listed = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
    return (
        f"Parts, timed alone, of AvataRL's step: {listed}; the rest {1 - sum(shares.values()):.1%}. "
        f"Peak, by a large product: {number(peak)} TFLOP/s."
    )


def estimator_tables(rows: list[Row]) -> str:
    """Noise and cost of each estimator."""
    header = ["gradient", "relative variance", "bias ratio", "µs per position (20–80 %)", "n"]
    tables = []
    for group in newest(rows, "device", "threads", "rewards", "positions", "vocabulary"):
        lines = []
        for row in group:
            per_position = {c: str(1e3 * float(row[c]) / float(row["positions"])) for c in row if c.endswith("_ms")}
            exact = "0" if row["alternative"] == "expected_reward" else "another function"
            noise = number(float(row["relative_variance"])) if row["relative_variance"] else exact
            bias = f"{float(row['bias_ratio']):.2f}" if row["bias_ratio"] else ""
            lines.append([row["alternative"], noise, bias, milliseconds(row | per_position), row["n"]])
        draws = max(row["draws"] for row in group)
        shape = f"rewards: {group[0]['rewards']}, N = {group[0]['positions']}, V = {int(group[0]['vocabulary']):,}"
        tables += [caption(group, f"{shape}, {draws} draws"), markdown(header, lines)]
    return "\n\n".join(tables)


TABLES: dict[str, tuple[str, Callable[[list[Row]], str]]] = {
    "loss": ("loss.csv", loss_tables),
    "sweep": ("loss.csv", sweep_tables),
    "step": ("step.csv", step_tables),
    "estimators": ("estimators.csv", estimator_tables),
}


def with_tables(text: str, results: Path = RESULTS) -> str:
    """The README with what stands between ``<!-- NAME -->`` and ``<!-- /NAME -->`` written anew."""
    for name, (file, tables) in TABLES.items():
        body = tables(read(results / file)) or "*No rows yet.*"
        between = re.compile(rf"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)", re.DOTALL)
        text = between.sub(lambda found, body=body: found[1] + body + found[2], text)
    return text


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text(encoding="utf-8")), encoding="utf-8")
