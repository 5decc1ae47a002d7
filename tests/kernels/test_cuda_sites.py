# SPDX-License-Identifier: Apache-2.0
"""The script that disables each synchronisation notices what it should, and can say no.

backends/group/test_kernels.py runs it on the kernels.
"""

from collections.abc import Collection
from functools import partial

import pytest

from benchmarks.emulating.build import ROUND_ROBIN, Sanitizer, Schedule
from tests.kernels.test_cuda_runtime import SITES, relay
from tests.support.cuda.machines import NEEDS_COMPILER
from tests.support.cuda.relay import BLOCKS, CLUSTERS, SOURCE
from tests.support.cuda.sites import Case, check, kernel_text, read

pytestmark = [pytest.mark.cuda_cpu, NEEDS_COMPILER]

RUNS: tuple[tuple[Sanitizer, Schedule], ...] = (("thread", ROUND_ROBIN), (None, ROUND_ROBIN))
TEXT = SOURCE.read_text()
CASES: dict[str, Case] = {name: partial(relay, name) for name in BLOCKS}


def test_every_site_of_the_relay_is_noticed() -> None:
    report = check(TEXT, CASES, RUNS)
    assert report.good, report
    assert str(report).endswith(f"sites {len(SITES)}, noticed {len(SITES)}")


def test_every_site_of_a_cluster_is_noticed() -> None:
    report = check(
        CLUSTERS.read_text().split("// Word and word")[0], {"by_cluster": partial(relay, "by_cluster")}, RUNS
    )
    assert report.good, report


def pretend(noticed: Collection[int], reached: Collection[int] = (0, 1)) -> Case:
    """A case that fails without the sites `noticed`."""

    def case(sanitizer: Sanitizer, schedule: Schedule, disabled: Collection[int]) -> set[int]:
        assert not set(disabled) & set(noticed)
        return set(reached)

    return case


TWO = "enum Site { FIRST, SECOND };\nblock_sync<FIRST>(); fence<SECOND>();"


@pytest.mark.parametrize(
    "text, case, lost",
    [
        (TWO, pretend([0]), {"SECOND": "its loss is not noticed"}),
        (TWO, pretend([0, 1], [0]), {"SECOND": "no case reaches it"}),
        (TWO.replace("SECOND }", "SECOND // GPU only: stale lines\n}"), pretend([0]), {}),
        (
            TWO.replace("SECOND }", "SECOND // GPU only: stale\n// lines\n}"),
            pretend([0, 1]),
            {"SECOND": "called GPU only, yet noticed: wrong values in case, round_robin"},
        ),
    ],
)
def test_a_site_is_noticed_or_proven(text: str, case: Case, lost: dict[str, str]) -> None:
    report = check(text, {"case": case}, [(None, ROUND_ROBIN)])
    assert report.lost == lost and report.good == (not lost)


def test_the_last_line_counts_proofs_apart() -> None:
    text = TWO.replace("SECOND }", "SECOND, // GPU only: the copy engine\n// is not modelled\n}")
    report = check(text, {"case": pretend([0])}, [(None, ROUND_ROBIN)])
    assert report.proven == {"SECOND": "the copy engine is not modelled"}
    assert str(report).endswith("sites 2, noticed 1, proven 1")


@pytest.mark.parametrize(
    "addition, error",
    [
        ("__syncthreads();", "__syncthreads belongs into device.cuh"),
        ('asm volatile("bar.sync 0;");', "asm belongs into device.cuh"),
        ("atomicAdd(p, 1);", "atomicAdd belongs into device.cuh"),
        ("__threadfence();", "__threadfence belongs into device.cuh"),
        ("volatile float *p = q;", "volatile belongs into device.cuh"),
        ("float x = __ldcg(p);", "__ldcg belongs into device.cuh"),
        ("block_sync<FIRST>();", "FIRST is used 2 times, not once"),
        ("block_sync<7>();", "block_sync<7> names no site"),
        ("copy_async_wait<0, 7>();", "copy_async_wait<0, 7> names no site"),
    ],
)
def test_synchronisation_past_the_header_is_found(addition: str, error: str) -> None:
    assert not read(TWO).errors
    assert error in read(f"{TWO}\n{addition}").errors
    assert not read(f"{TWO}\n// {addition}").errors


def test_the_kernels_name_all_their_synchronisation() -> None:
    source = read(kernel_text())
    assert not source.errors
    assert source.sites
