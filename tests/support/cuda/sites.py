# SPDX-License-Identifier: Apache-2.0
"""Is every synchronisation of the kernels needed, and would its loss be noticed?

    python -m tests.support.cuda.sites        # kernels/cuda, on the cases of tests/backends/group/test_kernels.py

Each enumerator of `enum Site` is disabled in turn while the cases run, under ThreadSanitizer and under
schedules that reorder stores and starve a block. A loss that nothing notices is an error, unless the comment at
the enumerator says `GPU only:` and why. So is a synchronisation that is written past device.cuh, and one that a
configuration reaches and does not notice by itself, unless it only counts after a failure.
"""

import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field

from benchmarks.emulating.build import CUDA, ROUND_ROBIN, Sanitizer, Schedule, hoarding, shuffled, starve

# A case builds its programs for a sanitizer, runs them under a schedule with sites disabled, asserts its values,
# and returns the sites that it reached.
Case = Callable[[Sanitizer, Schedule, Collection[int]], set[int]]

# In the order of what they cost for what they find; values alone decide where there is no sanitizer.
RUNS: tuple[tuple[Sanitizer, Schedule], ...] = (
    ("thread", ROUND_ROBIN),
    (None, hoarding(0)),
    (None, shuffled(0)),
    *((None, starve(block)) for block in range(2)),
)

FUNCTIONS = (
    "block_sync",
    "named_sync",
    "warp_sync",
    "load_relaxed",
    "store_relaxed",
    "load_acquire",
    "store_release",
    "add_release",
    "add_acquire_release",
    "fence",
    "copy_async_16",
    "copy_async_wait",
    "cluster_sync",
    "arrive_expecting",
    "arrived",
    "store_async",
)
CALL = re.compile(rf"\b({'|'.join(FUNCTIONS)})\s*<([^<>;]*)>\s*\(")
PAST_THE_HEADER = re.compile(
    r"\b(?:asm|volatile|__asm__|__sync\w+|__threadfence\w*|__barrier\w*|__shfl\w*|__nanosleep|__pipeline\w*"
    r"|__(?:ld|st)(?:cg|ca|cs|cv|g|lu|wb|wt)|__reduce\w*_sync|__match\w*|__ballot\w*|__(?:all|any)_sync"
    r"|atomic[A-Z]\w*|__atomic\w*|wmma|cooperative_groups"
    r"|cuda\s*::|GPU_RNN_CPU)\b"
)
AFTER_A_FAILURE = {"END_BLOCK", "END_COUNT", "END_WARP", "END"}  # before outputs become NaN
COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)


@dataclass
class Source:
    """What the text of some CUDA files says about their synchronisation."""

    sites: dict[str, int]
    proofs: dict[str, str]  # sites that only a GPU needs, and why
    errors: list[str]


@dataclass
class Report:
    noticed: dict[str, str] = field(default_factory=dict)  # site: what noticed
    proven: dict[str, str] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)  # neither
    errors: list[str] = field(default_factory=list)  # in the text

    @property
    def good(self) -> bool:
        return not self.lost and not self.errors

    def __str__(self) -> str:
        lines = [f"{name}: {how}" for name, how in self.noticed.items()]
        lines += [f"{name}: GPU only: {why}" for name, why in self.proven.items()]
        lines += [f"ERROR {name}: {why}" for name, why in self.lost.items()]
        lines += [f"ERROR {error}" for error in self.errors]
        total = len(self.noticed) + len(self.proven) + len(self.lost)
        proven = f", proven {len(self.proven)}" if self.proven else ""
        return "\n".join([*lines, f"sites {total}, noticed {len(self.noticed)}{proven}"])


def read(text: str) -> Source:
    """Sites, proofs, and broken rules: a site used not once, a number for a site, a word past the header."""
    sites: dict[str, int] = {}
    comments: dict[str, str] = {}
    name = ""
    for body in re.findall(r"\benum\s+Site\s*\{(.*?)\}", text, re.S):
        for comment, word in re.findall(r"//([^\n]*)|(\w+)", body):
            name = word or name
            comments[name] = " ".join([comments.get(name, ""), *comment.split()])
            if word:
                sites[name] = len(sites)
    proofs = {
        name: comment.split("GPU only:")[1].strip() for name, comment in comments.items() if "GPU only:" in comment
    }
    code = COMMENT.sub(" ", re.sub(r"\benum\s+Site\s*\{.*?\}", "", text, flags=re.S))
    errors = [
        f"{name} is used {count} times, not once"
        for name in sites
        if (count := len(re.findall(rf"\b{name}\b", code))) != 1
    ]
    errors += [f"{found} belongs into device.cuh" for found in dict.fromkeys(PAST_THE_HEADER.findall(code))]
    for function, arguments in CALL.findall(code):
        site = arguments.split(",")[function == "copy_async_wait"].strip()
        if site not in sites and site != "SITE":
            errors.append(f"{function}<{arguments}> names no site")
    return Source(sites, proofs, errors)


def notice(site: int, cases: Mapping[str, Case], runs: Iterable[tuple[Sanitizer, Schedule]]) -> str | None:
    """What first goes wrong without this site."""
    for sanitizer, schedule in runs:
        for name, case in cases.items():
            try:
                case(sanitizer, schedule, {site})
            except AssertionError as error:  # Failure is one
                what = getattr(error, "kind", "wrong values")
                return f"{what} in {name}, {schedule}{' under ThreadSanitizer' * (sanitizer == 'thread')}"
    return None


def check(text: str, cases: Mapping[str, Case], runs: Collection[tuple[Sanitizer, Schedule]] = RUNS) -> Report:
    """Disable each site of `text` while `cases` run.

    Raises:
        AssertionError: a case fails with every site in place.
    """
    source = read(text)
    report = Report(errors=source.errors)
    reached = {name: set.union(*(case(*run, ()) for run in runs)) for name, case in cases.items()}
    for name, site in source.sites.items():
        concerned = {key: case for key, case in cases.items() if site in reached[key]}
        how = notice(site, concerned, runs)
        if how and name in source.proofs:
            report.lost[name] = f"called GPU only, yet noticed: {how}"
        elif how:
            report.noticed[name] = how
        elif name in source.proofs:
            report.proven[name] = source.proofs[name]
        else:
            report.lost[name] = "its loss is not noticed" if concerned else "no case reaches it"
    return report


def unnoticed(text: str, case: Case, runs: Collection[tuple[Sanitizer, Schedule]] = RUNS) -> list[str]:
    """Sites that a case reaches and does not notice the loss of, but for those that need a GPU or a failure."""
    source = read(text)
    reached = set.union(*(case(*run, ()) for run in runs))
    asked = {name: site for name, site in source.sites.items() if site in reached}
    excused = AFTER_A_FAILURE | source.proofs.keys()
    return [name for name, site in asked.items() if name not in excused and not notice(site, {"": case}, runs)]


def kernel_text() -> str:
    """All CUDA sources but the header of device functions."""
    files = sorted([*CUDA.glob("*.cuh"), *CUDA.glob("*.cu")])
    return "\n".join(file.read_text() for file in files if file.name != "device.cuh")


def main() -> int:
    from tests.backends.group.test_kernels import CONFIGURATIONS, site_case, site_cases

    report = check(kernel_text(), site_cases())
    print(report)
    lost = {name: unnoticed(kernel_text(), site_case(*each)) for name, each in CONFIGURATIONS.items()}
    for name, sites in lost.items():
        print(f"{name}: {'ERROR ' + ', '.join(sites) if sites else 'each is noticed'}")
    return not report.good or any(lost.values())


if __name__ == "__main__":
    sys.exit(main())
