"""The rows of the GPU benchmarks as tables, with targets: a part of docs/numbers.md and a few rows for README.md."""

from __future__ import annotations

DENSE = ("cudnn", "flash")  # torch's own attention
LEFT_OUT = ("way",)  # rows that only found a crossover


def section(results: dict, source: str) -> str:
    """The section of one GPU, Markdown."""
    families = results["families"]
    environments = [family["environment"] for family in families.values()]
    newest = max(environments, key=lambda e: e["date"])
    limits = max((family["rooflines"] for family in families.values()), key=lambda r: r["bf16_matmul_tflops"])
    changed = {True: " with uncommitted changes", False: ""}
    commits = sorted({f"commit {e['commit']}{changed[e['uncommitted']]}" for e in environments})
    parts = [
        f"## {newest['gpu']}",
        f"torch {newest['torch']}, Triton {newest['triton']}, driver {newest['driver']}; {newest['date'][:10]}, "
        f"{', '.join(commits)}. From [`{source.rpartition('/')[2]}`]({source}). A torch matrix product of 8,192³ in "
        f"bf16 reaches {limits['bf16_matmul_tflops']:.0f} TFLOP/s here, a copy {limits['copy_gbps']:,.0f} GB/s (bytes "
        f"read and written), a sum {limits['read_gbps']:,.0f} GB/s. Everything is bf16, with 32 query heads on 8 KV "
        "heads where there are heads.",
    ]
    for name, family in families.items():
        rows = [row for row in family["rows"] if not any(key in row for key in LEFT_OUT)]
        if rows:
            unfinished = "" if family["complete"] else " (not all cases were measured)"
            parts.append(f"### {name[0].upper()}{name[1:]}{unfinished}\n\n" + "\n".join(table(rows)))
    return "\n\n".join(parts) + "\n"


def table(rows: list[dict]) -> list[str]:
    lines = ["| | time | how much faster than | share of the limit | target |", "|---|--:|---|---|---|"]
    for row in rows:
        cells = name_of(row), time_of(mine(row)), against(row), share(row), target(row, rows)
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def mine(row: dict) -> float:
    return row["ms"]["headstart"]


def time_of(ms: float) -> str:
    return f"{1e3 * ms:.3g} µs" if ms < 1 else f"{ms:.3g} ms" if ms < 1000 else f"{ms / 1000:.3g} s"


def name_of(row: dict) -> str:
    known = {"op", "served_by", "ms", "gbps", "of_read", "of_copy", "tflops", "of_matmul", "error", "speedup",
             "dense_tflops", "of_sparse_attention", "kept"}  # fmt: skip
    case = [f"{key.replace('_', ' ')} {value:,}" if isinstance(value, int) and not isinstance(value, bool)
            else f"{key.replace('_', ' ')} {value}" for key, value in row.items() if key not in known]  # fmt: skip
    return f"`{row['op']}`, {', '.join(case)}"


def against(row: dict) -> str:
    return ", ".join(f"{ms / mine(row):.2f}× {way}" for way, ms in row["ms"].items() if way != "headstart")


def share(row: dict) -> str:
    words = {"of_read": "of the read rate", "of_copy": "of the copy rate", "of_matmul": "of the matmul rate",
             "of_sparse_attention": "of the sparse attention"}  # fmt: skip
    shares = [f"{100 * row[key]:.0f} % {text}" for key, text in words.items() if row.get(key) is not None]
    tflops = f"{row['tflops']:.0f} TFLOP/s" if row.get("tflops", 0) > 10 else ""
    return ", ".join(filter(None, [tflops, *shares]))


def target(row: dict, rows: list[dict]) -> str:
    """What the row must reach, and whether it does; nothing where no target is set."""
    found = goal(row, rows)
    if found is None:
        return ""
    words, met = found
    return words if met else f"**missed:** {words}"


def goal(row: dict, rows: list[dict]) -> tuple[str, bool] | None:
    op, times = row["op"], row["ms"]
    if op == "sparse_attention" and "tokens" in row:
        if row["density"] == 1:
            best = min((times[way] for way in DENSE if way in times), default=None)
            return None if best is None else ("≥ 0.60× the best of torch", best / mine(row) >= 0.6)
        alike = ("tokens", "head_dim", "block")
        dense = next((r for r in rows if r.get("density") == 1 and all(r[key] == row[key] for key in alike)), None)
        return dense and ("≤ 1.15 · density · every block", mine(row) <= 1.15 * row["density"] * mine(dense))
    if op == "int4_gemm" and row["rows"] == 1:
        return "≥ 75 % of the read rate", row["of_read"] >= 0.75
    if op == "int4_gemm" and row["rows"] <= 64:
        return "≥ 3× linear", times["linear"] / mine(row) >= 3
    if op == "int4_gemm" and row["rows"] >= 512:
        return "≥ 0.95× linear", times["linear"] / mine(row) >= 0.95
    if op == "bitmap_decompress":
        return "≥ 80 % of the copy rate", row["of_copy"] >= 0.8
    if op == "bitmap_gemm" and row["rows"] == 1:
        return "≥ 1.3× linear", times["linear"] / mine(row) >= 1.3
    if op.endswith("_index") and row["tokens"] >= 131072:
        return "≤ 15 % of the sparse attention", row["of_sparse_attention"] <= 0.15
    return None


def summary(results: dict) -> list[str]:
    """A few rows for README.md."""
    wanted = (
        ("sparse_attention", dict(tokens=32768, head_dim=128, block=128, density=1.0)),
        ("sparse_attention", dict(tokens=131072, head_dim=128, block=64, density=0.1)),
        ("sparse_attention", dict(sequences=1, keys=131072, density=0.1)),
        ("adaptive_block_index", dict(tokens=32768, options="stride 8")),
        ("centroid_lookup", dict(keys=131072, queries=1, parents=False)),
        ("int4_gemm", dict(rows=1, columns=8192, k=8192)),
        ("bitmap_decompress", dict(columns=8192, k=8192, density=0.5, values="same")),
        ("prefill", dict(model="Llama 3 8B", tokens=131072)),
    )
    rows = [row for family in results["families"].values() for row in family["rows"]]
    lines = ["| | time; how much faster than; share of the limit |", "|---|---|"]
    for op, case in wanted:
        for row in rows:
            if row["op"] == op and all(row.get(key) == value for key, value in case.items()):
                figures = ", ".join(filter(None, (against(row), share(row))))
                lines.append(f"| {name_of(row)} | {time_of(mine(row))}; {figures} |")
    return lines
