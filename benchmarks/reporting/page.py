# SPDX-License-Identifier: Apache-2.0
"""The page of one GPU: what was run, the summary, the losses, the pictures, and a table of every case."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from types import MappingProxyType

from benchmarks.cases.names import PEERS, TORCH
from benchmarks.reporting import cpu
from benchmarks.reporting.results import (
    DIRECTIONS,
    DTYPES,
    NOISE,
    OPTION_LIMIT,
    Case,
    Row,
    against_default,
    per_step,
    timed,
)
from benchmarks.reporting.summary import SIZES, Measured, figure, ratios, size
from benchmarks.reporting.tables import number, paragraph, ratio, table, time

COUNTED = ("ratio to torch.nn: geometric mean (lowest to highest)", "cases without a ratio:")
CERTIFIED = "The [certificate]({}/certificate.md) says what was checked on this GPU, and how that ended."
UNCERTIFIED = "No certificate of this GPU is there: `make gpu-check` writes it."
ON_A_CPU = (
    "These are times on a CPU. They say nothing of a GPU. The backend of a case is the one that a layer took in that\n"
    "run; cost models fitted later may take another."
)
OF_A_CPU = ("Time of a step and its multiplications", "Streams")  # a GPU's page does without
VERSIONS = ("driver", "cuda", "cudnn", "torch", "triton", "cupy", "onnxruntime", "compiler")


def markdown(
    gpu: Measured,
    pictures: Mapping[str, tuple[str, list[str]]],
    certified: bool,
    more: Mapping[str, list[str]] = MappingProxyType({}),
    after: Sequence[str] = (),
) -> str:
    """The page. `pictures`: by title, what to say about them and their paths; `more`: by title, what comes below them;
    `after`: what is simulated of the device."""
    cases = gpu.cases
    lines = [
        f"# {gpu.device}",
        "",
        *_provenance([*cases, *gpu.streams]),
        "",
        _standing(gpu, certified),
        "",
        "## Summary",
        "",
        *(_summary(cases) if gpu.is_gpu else cpu.summary(cases)),
        *([] if gpu.is_gpu else cpu.goals(cases)),
    ]
    for title, (caption, paths) in pictures.items():
        if not (paths or (gpu.is_gpu and title not in OF_A_CPU)):  # a CPU has no floor, and its memory is not counted
            continue
        lines += ["", f"## {title}", "", *paragraph(caption)]
        for path in paths:
            lines += ["", f"![{title}: {path.rpartition('/')[2]}]({path})"]
        lines += [] if paths else ["", "Not measured."]
        lines += more.get(title, [])
    lines += ["", "## Where it is slower", "", *_slower(gpu)]
    rows = [[f"[{name}]({gpu.name}/{name}.md)", *_counted(own)] for name, own in by_set(gpu).items()]
    lines += ["", "## Every case", "", *table(["set", *COUNTED], rows)]
    lines += ["", "## Not timed", "", *_refused([*cases, *gpu.streams]), *after]
    return "\n".join(lines) + "\n"


def _standing(gpu: Measured, certified: bool) -> str:
    """What the times are worth."""
    if not gpu.is_gpu:
        return ON_A_CPU
    return CERTIFIED.format(gpu.name) if certified else UNCERTIFIED


def of_set(gpu: Measured, name: str, cases: Sequence[Case]) -> str:
    """The page with every case of a set."""
    about = [
        f"Of the report on [{gpu.device}](../{gpu.name}.md). Times are µs a step, all layers together: median (20th "
        "to 80th",
        "percentile). The backend is the one that a layer takes by itself. **Bold** is a loss: a ratio to "
        "torch.nn below",
        f"{NOISE}, an option that takes more than {OPTION_LIMIT:.2f} times the default's time, or another variant "
        "that is faster.",
    ]
    if gpu.is_gpu:
        about += [
            'The floor is the least that a GPU allows a step, whoever writes the kernel, and "of it" that by our time. '
            "MiB are the",
            "most that a call takes on top of its input and weights.",
        ]
    return "\n".join([f"# The set {name}", "", *about, "", *_cases(cases)]) + "\n"


def by_set(gpu: Measured) -> dict[str, list[Case]]:
    """Every case; streams as a set of their own."""
    sets = {name: list(own) for name, own in groupby(gpu.cases, key=lambda case: case["set"])}
    return sets | ({"streams": list(gpu.streams)} if gpu.streams else {})


def _provenance(cases: Iterable[Case]) -> list[str]:
    """What was run, one line a run."""
    runs = {row["date"]: row for case in cases for row in case.rows}
    lines = ["[What is measured](../performance.md#what-is-measured), and how. The runs:", ""]
    for date, row in sorted(runs.items()):
        state = {"yes": " with uncommitted changes", "": " (not known whether changed)"}.get(row["dirty"], "")
        versions = [f"{name} {row[name]}" for name in VERSIONS if row[name]]
        lines.append(f"- {date}, commit {row['commit'][:12] or 'unknown'}{state}: {', '.join(versions)}")
    return lines


def _summary(cases: Sequence[Case]) -> list[str]:
    """By dtype, direction and size, and all together; what has no ratio is counted too."""
    groups: dict[tuple[str, str, str], list[Case]] = {}
    standard = [case for case in cases if not case["option"]]
    for case in standard:
        groups.setdefault((case["dtype"], case["direction"], size(case)), []).append(case)
    rows = [[*key, *_counted(group)] for key, group in sorted(groups.items(), key=_rank)]
    rows.append(["all", "", "", *_counted(standard)])
    return table(["dtype", "direction", "size", *COUNTED], rows)


def _rank(group: tuple[tuple[str, str, str], list[Case]]) -> tuple[int, ...]:
    return tuple(names.index(name) for names, name in zip((DTYPES, DIRECTIONS, SIZES), group[0], strict=True))


def _counted(cases: Sequence[Case]) -> list[object]:
    found = ratios(cases)
    return [figure(found), len(cases) - len(found)]


def _slower(gpu: Measured) -> list[str]:
    """All losses, to torch.nn, to other libraries and of options, the worst first."""
    peers = [
        (case, row, per_step(row) / per_step(case.ours)) for case in gpu.cases if timed(case.ours) for row in case.peers
    ]
    measured = [name for name in PEERS if any(row["variant"] == name for _, row, _ in peers)]
    behind = sorted((item for item in peers if item[2] < NOISE), key=lambda item: item[2])
    options = against_default(gpu.cases)
    dear = sorted((item for item in options if item[1] > OPTION_LIMIT), key=lambda item: -item[1])
    share = f"{100 * (OPTION_LIMIT - 1):.0f} %"
    lines = [f"Than torch.nn, by more than noise: **{len(gpu.lost)} of {len(gpu.ratios)}** cases."]
    lines += _listed(["case", "backend", "ratio:"], [[c, c.ours["variant"], ratio(c.ratio)] for c in gpu.lost])
    lines += [
        "",
        f"Than something else ({', '.join(measured or PEERS)}), by more than noise: **{len(behind)} of {len(peers)}** "
        "comparisons.",
    ]
    lines += _listed(["case", "library", "its time by ours:"], [[c, row["variant"], ratio(r)] for c, row, r in behind])
    lines += [
        "",
        f"With an option, more than {share} over the same layer without: **{len(dear)} of {len(options)}** cases.",
    ]
    return lines + _listed(["case", "time by the default's:"], [[case, _cost(cost)] for case, cost in dear])


def _listed(heads: list[str], rows: list[list[object]]) -> list[str]:
    return ["", *table(heads, rows)] if rows else []


def _cases(cases: Sequence[Case]) -> list[str]:
    heads = [
        "problem",
        "dtype",
        "direction",
        "threads:",
        "backend",
        "ours, µs",
        "torch.nn, µs",
        "ratio:",
        "by the default's:",
    ]
    heads += ["floor, µs:", "of it:", "ours, MiB:", "torch.nn, MiB:", "others, µs"]
    costs = {id(case): cost for case, cost in against_default(cases)}
    return table(heads, [_line(case, costs.get(id(case))) for case in cases])


def _line(case: Case, cost: float | None) -> list[str]:
    ours, theirs = case.ours, case.theirs
    line = [case["problem"], case["dtype"], case["direction"], case["threads"], ours["variant"] if ours else ""]
    line += [time(ours), time(theirs), ratio(case.ratio), _cost(cost)]
    line += [number(float(ours["floor_us"])) if ours and ours["floor_us"] else "", _percent(ours)]
    line += [row["peak_mib"] if row else "" for row in (ours, theirs)]
    others = [row for row in case.rows if timed(row) and not row["chosen"] and row["variant"] != TORCH]
    return [*line, ", ".join(_other(row, ours) for row in others)]


def _cost(cost: float | None) -> str:
    if cost is None:
        return ""
    return f"{cost:.2f}×" if cost <= OPTION_LIMIT else f"**{cost:.2f}×**"


def _percent(row: Row | None) -> str:
    return f"{float(row['of_floor']) * 100:.0f} %" if row and row["of_floor"] else ""


def _other(row: Row, ours: Row | None) -> str:
    text = f"{row['variant']} {number(per_step(row))}"
    faster = ours is not None and timed(ours) and per_step(row) < NOISE * per_step(ours)
    return f"**{text}**" if faster else text


def _refused(cases: Iterable[Case]) -> list[str]:
    """Everything that has no time, by the reason."""
    found: dict[str, list[str]] = {}
    for case in cases:
        for row in case.rows:
            if not timed(row):
                reason = ". ".join(text for text in (f"{row['variant']}: {row['status']}", row["detail"]) if text)
                found.setdefault(reason, []).append(str(case))
    lines = [f"- {reason} — {', '.join(names)}" for reason, names in found.items()]
    return lines or ["Nothing: all that was tried has a time."]
