# SPDX-License-Identifier: Apache-2.0
"""The runtime of benchmarks/emulating: silent on correct kernels under every schedule, loud on what it is for."""

from collections.abc import Callable, Collection

import pytest
import torch

from benchmarks.emulating.build import (
    ROUND_ROBIN,
    Failure,
    Sanitizer,
    Schedule,
    hoarding,
    load,
    run,
    shuffled,
    starve,
)
from tests.support.cuda.machines import NEEDS_COMPILER
from tests.support.cuda.relay import BLOCKS, CLUSTERS, SOURCE, problem
from tests.support.cuda.sites import read

pytestmark = [pytest.mark.cuda_cpu, NEEDS_COMPILER]

SITES = read(SOURCE.read_text()).sites
OF_CLUSTERS = read(CLUSTERS.read_text()).sites
SCHEDULES = [ROUND_ROBIN, shuffled(0), starve(0), hoarding(0)]


def relay(kernel: str, sanitizer: Sanitizer, schedule: Schedule, disabled: Collection[int] = ()) -> set[int]:
    """Run one kernel of relay.cu or relay_cluster.cu and assert its values; the sites that it reached."""
    grid, block, shared_bytes, arguments, h, expected = problem(kernel)
    cluster = grid if kernel == "by_cluster" else 1
    program = load(CLUSTERS if cluster > 1 else SOURCE, sanitizer=sanitizer)
    reached = run(program, kernel, grid, block, shared_bytes, arguments, schedule, disabled, cluster=cluster)
    assert torch.equal(h, expected)
    return reached


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["round_robin", "shuffled", "starve", "hoarding"])
@pytest.mark.parametrize("sanitizer", ["thread", "address"])
@pytest.mark.parametrize("kernel", [*BLOCKS, "by_cluster"])
def test_correct_kernels_are_silent(kernel: str, sanitizer: Sanitizer, schedule: Schedule) -> None:
    relay(kernel, sanitizer, schedule)


@pytest.mark.parametrize(
    "kernel, lost",
    [
        ("by_flag", "FLAG_WRITTEN"),  # a barrier before the flag
        ("by_flag", "FLAG_SEEN"),  # a barrier after it
        ("by_flag", "FLAG_SEND"),  # relaxed instead of release
        ("by_flag", "FLAG_SEE"),  # relaxed instead of acquire
        ("by_counter", "COUNT_SEND"),
        ("by_fence", "FENCE_BEFORE"),
        ("by_fence", "FENCE_AFTER"),
        ("by_word", "WORD_SEND"),  # plain instead of relaxed
        ("by_stage", "STAGE_ARRIVED"),
        ("by_warp", "WARP_WRITTEN"),
    ],
)
def test_thread_sanitizer_sees_lost_order_in_any_schedule(kernel: str, lost: str) -> None:
    for schedule in SCHEDULES[:2]:
        with pytest.raises(Failure, match="data race") as raised:
            relay(kernel, "thread", schedule, [SITES[lost]])
        assert raised.value.kind == "race"


@pytest.mark.parametrize("lost", ["STAGE_WAIT", "STAGE_FIRST", "STAGE_NEXT"])
def test_copies_arrive_at_the_wait_and_not_before(lost: str) -> None:
    with pytest.raises(AssertionError) as raised:
        relay("by_stage", None, ROUND_ROBIN, [SITES[lost]])
    assert not isinstance(raised.value, Failure)  # nothing but the values


def test_thread_sanitizer_sees_bytes_that_are_counted_too_early() -> None:
    for schedule in SCHEDULES[:2]:
        with pytest.raises(Failure, match="data race") as raised:
            relay("by_cluster", "thread", schedule, [OF_CLUSTERS["SEND"]])
        assert raised.value.kind == "race"


@pytest.mark.parametrize("schedule", [shuffled, hoarding])
@pytest.mark.parametrize("lost", ["ARRIVED", "SEND", "EXPECT", "EXPECT_AGAIN"])
def test_words_arrive_late_and_no_sooner_than_their_bytes_are_counted(
    lost: str, schedule: Callable[[int], Schedule]
) -> None:
    with pytest.raises(AssertionError):
        for seed in range(4):
            relay("by_cluster", None, schedule(seed), [OF_CLUSTERS[lost]])


def test_a_block_that_has_not_begun_counts_nothing() -> None:
    with pytest.raises(Failure, match="before their start"):
        relay("by_cluster", None, starve(0), [OF_CLUSTERS["BEGIN"]])


def kernel(body: str, parameters: str = "float *out") -> str:
    return f"""#include "device.cuh"
enum Site {{ A, B, C, D, E }};
extern "C" __global__ void kernel({parameters}) {{ {body} }}
"""


def launch(
    body: str,
    *,
    sanitizer: Sanitizer = None,
    schedule: Schedule = ROUND_ROBIN,
    grid: int = 1,
    block: int = 64,
    cluster: int = 1,
    timeout: float = 60,
) -> torch.Tensor:
    out = torch.zeros(grid * block)
    program = load(kernel(body), sanitizer=sanitizer)
    run(program, "kernel", grid, block, 256, [out], schedule, timeout=timeout, cluster=cluster)
    return out


@pytest.mark.parametrize(
    "body, rule",
    [
        ("if (warp() == 0) block_sync<A>();", "deadlock: 32 threads wait"),
        ("if (lane() < 16) shuffle_xor(1u, 1);", "deadlock"),
        ("if (lane() < 16) shuffle_xor(1u, 1); else warp_sync<A>(~0u);", "deadlock"),
        (
            "float d[4] = {}; unsigned a[4] = {}, b[2] = {};if (lane() < 16) mma_f16(d, a, b); else mma_bf16(d, a, b);",
            "different operations",
        ),
        ("warp_sync<A>(0xffff);", "full mask"),
        ("named_sync<A>(1, warp() ? 96 : 64);", "disagree"),
        ("named_sync<A>(0, 64);", "named barrier"),
        ("copy_async_16<A>(shared_memory(), out + 1, true);", "16 aligned bytes"),
        ("copy_async_16<A>(out, out, true);", "shared memory"),
        (
            "store_relaxed<A>(reinterpret_cast<unsigned *>(reinterpret_cast<char *>(out) + 2), 1u);",
            "aligned and global",
        ),
        ("store_relaxed<A>(reinterpret_cast<unsigned *>(shared_memory()), 1u);", "aligned and global"),
    ],
)
def test_broken_rules_end_the_run(body: str, rule: str) -> None:
    with pytest.raises(Failure, match=rule) as raised:
        launch(body)
    assert raised.value.kind == "rule"


@pytest.mark.parametrize(
    "body",
    [
        "out[thread_index() + 1] = 1;",
        "float *s = reinterpret_cast<float *>(shared_memory()); out[thread_index()] = s[thread_index() + 1];",
        "out[thread_index() - 1] = 1;",
    ],
)
def test_address_sanitizer_knows_where_buffers_end(body: str) -> None:
    with pytest.raises(Failure, match="heap-buffer-overflow") as raised:
        launch(body, sanitizer="address")
    assert raised.value.kind == "address"


def test_shared_memory_begins_as_nan() -> None:
    assert launch("out[thread_index()] = reinterpret_cast<float *>(shared_memory())[thread_index()];").isnan().all()


def test_no_thread_is_ordered_by_the_schedule_alone() -> None:
    """All run in one system thread, and still a value passed without synchronisation is a race."""
    with pytest.raises(Failure, match="data race"):
        launch("out[0] = thread_index();", sanitizer="thread")


@pytest.mark.parametrize(
    "meeting",
    ["shuffle_xor(1u, 1);", "{ float d[4] = {}; unsigned a[4] = {}, b[2] = {}; mma_f16(d, a, b); }"],
)
def test_meeting_without_a_barrier_orders_no_memory(meeting: str) -> None:
    body = f"out[thread_index()] = 1; {meeting} out[thread_index() ^ 1] += 1;"
    with pytest.raises(Failure, match="data race"):
        launch(body, sanitizer="thread", block=32)


def test_a_barrier_orders_only_those_who_met() -> None:
    """Warps 0 and 1 meet, then 1 and 2 at the same barrier: what 0 did comes before 2, and nothing else."""
    first = "if (warp() < 2) named_sync<A>(1, 64); if (warp() == 1 || warp() == 2) named_sync<B>(1, 64);"
    launch(
        f"if (thread_index() == 0) out[0] = 1; {first} if (thread_index() == 64) out[0] = 2;",
        sanitizer="thread",
        block=96,
    )
    with pytest.raises(Failure, match="data race"):
        launch(
            f"if (thread_index() == 64) out[0] = 1; {first} if (thread_index() == 0) out[0] = 2;",
            sanitizer="thread",
            block=96,
        )


def test_a_barrier_forgets_who_met_before() -> None:
    """Warps 2 and 3 meet after warps 0 and 1 did, at the same barrier: that tells them nothing of what 0 wrote."""
    body = """
    unsigned *met = reinterpret_cast<unsigned *>(out) + 64;
    if (thread_index() == 0) out[0] = 1;
    if (warp() >= 2) while (load_relaxed<A>(met) == 0) poll_pause();
    named_sync<B>(1, 64);
    if (thread_index() == 0) store_relaxed<C>(met, 1u);
    if (thread_index() == 64) out[0] = 2;
    """
    with pytest.raises(Failure, match="data race"):
        launch(body, sanitizer="thread", block=128)


COPY = """
float *slots = reinterpret_cast<float *>(shared_memory());
slots[thread_index()] = 1;
block_sync<A>();

if (thread_index() == 0) copy_async_16<B>(slots + 4, out + 32, true);
copy_async_commit();
%s
copy_async_wait<0, E>();
"""


def test_a_copy_has_not_arrived_before_its_wait() -> None:
    out = launch(COPY % "if (thread_index() == 0) out[63] = slots[4];", block=32, grid=2)
    assert out[63].isnan()


def test_a_copy_may_write_from_its_issue_on() -> None:
    """A reader of the old data comes before the wait, by a barrier, and not before the issue."""
    body = COPY % "if (thread_index() == 4) out[4] = slots[4]; block_sync<C>();"
    with pytest.raises(Failure, match="data race"):
        launch(body, sanitizer="thread", block=32, grid=2)


# Data and flag are relaxed: ThreadSanitizer has nothing to say, only the order of arrival shows the mistake.
LATE = """
unsigned *words = reinterpret_cast<unsigned *>(out);
unsigned *flag = words + 128; // the third block has no other use
if (block_index() == 0) {
  store_relaxed<A>(words + thread_index(), 7u);
  block_sync<B>();
  if (thread_index() == 0) %s(flag, 1u);
} else if (block_index() == 1) {
  while (load_acquire<C>(flag) == 0) poll_pause();
  words[64 + thread_index()] = load_relaxed<D>(words + thread_index());
}
"""


@pytest.mark.parametrize("schedule", [shuffled, hoarding])
@pytest.mark.parametrize("order, seen", [("release", True), ("relaxed", False)])
def test_relaxed_stores_leave_their_block_late(order: str, seen: bool, schedule: Callable[[int], Schedule]) -> None:
    results = [launch(LATE % f"store_{order}<E>", schedule=schedule(seed), grid=3) for seed in range(4)]
    assert all((result[64:128].view(torch.int32) == 7).all() for result in results) == seen


@pytest.mark.parametrize("schedule", [shuffled(0), hoarding(0)], ids=["shuffled", "hoarding"])
def test_a_block_sees_its_own_stores_at_once(schedule: Schedule) -> None:
    body = """
    store_relaxed<A>(out + thread_index(), 7.0f);
    block_sync<B>();
    float seen = load_relaxed<C>(out + (thread_index() ^ 33));
    block_sync<D>();
    store_relaxed<E>(out + thread_index(), seen + 1);
    """
    assert (launch(body, sanitizer="thread", schedule=schedule) == 8).all()


def test_a_starved_block_is_late_for_those_who_do_not_wait() -> None:
    body = """
    unsigned *words = reinterpret_cast<unsigned *>(out);
    if (block_index() == 0) store_relaxed<A>(words + thread_index(), 7u);
    for (int i = 0; i < 3; ++i) block_sync<B>();
    if (block_index() == 1)
      store_relaxed<C>(words + 64 + thread_index(), load_relaxed<D>(words + thread_index()));
    """

    def seen(schedule: Schedule) -> bool:
        return bool((launch(body, schedule=schedule, grid=2)[64:].view(torch.int32) == 7).all())

    assert seen(ROUND_ROBIN) and seen(starve(1)) and not seen(starve(0))


def test_the_patience_with_a_starved_block_can_be_chosen() -> None:
    body = """
    if (block_index() == 0) { out[thread_index()] = 1; return; }
    for (int polls = 0; polls < 100; ++polls) poll_pause();
    out[64 + thread_index()] = load_relaxed<A>(out + thread_index());
    """
    assert launch(body, schedule=starve(0), grid=2)[64:].all()
    assert not launch(body, schedule=starve(0, patience=10_000), grid=2)[64:].any()


SEND = """
Arrivals *arrivals = reinterpret_cast<Arrivals *>(shared_memory());
float *slots = reinterpret_cast<float *>(shared_memory() + 8);
if (thread_index() == 0) arrivals_start(arrivals, 1);
cluster_sync<A>();
%s
"""


@pytest.mark.parametrize(
    "body, rule",
    [
        ("store_async<B>(slots, 1.0f, arrivals, 2);", "below the blocks of a cluster"),
        ("store_async<B>(out, 1.0f, arrivals, 0);", "shared memory"),
        ("store_async<B>(slots, 1.0f, arrivals + 1, 0);", "before their start"),
        ("arrive_expecting<B>(arrivals, 0); arrive_expecting<B>(arrivals, 8);", "more threads arrive"),
        ("arrive_expecting<B>(arrivals, 1 << 20);", "can be counted"),
        ("if (block_index()) { for (int k = 0; k < 9; ++k) poll_pause(); store_async<B>(slots, 1.0f, arrivals, 0); }",
         "block 0, which has left"),
        ("if (block_index()) cluster_sync<B>();", "deadlock: 64 threads wait"),
    ],
)  # fmt: skip
def test_broken_rules_of_a_cluster_end_the_run(body: str, rule: str) -> None:
    with pytest.raises(Failure, match=rule) as raised:
        launch(SEND % body, grid=2, cluster=2)
    assert raised.value.kind == "rule"


def test_blocks_that_fill_no_cluster_are_not_launched() -> None:
    with pytest.raises(Failure, match="3 blocks make no clusters of 2"):
        launch("", grid=3, cluster=2)


def test_who_waits_for_a_phase_sees_what_its_sender_did_before() -> None:
    """In global memory too: who sends releases, and who has waited acquires."""
    body = """
    if (block_index() == 1) {
      out[64 + thread_index()] = 7;
      store_async<B>(slots + thread_index() % 32, 1.0f, arrivals, 0);
    } else {
      if (thread_index() == 0) arrive_expecting<C>(arrivals, 4 * 64);
      while (!arrived<D>(arrivals, 0)) poll_pause();
      out[thread_index()] = out[64 + thread_index()];
    }
    cluster_sync<E>();
    """
    assert (launch(SEND % body, sanitizer="thread", grid=2, cluster=2) == 7).all()


def test_virtual_time_reaches_a_deadline() -> None:
    """Ten seconds of waiting for nobody."""
    body = """
    unsigned long long start = clock_ns();
    while (load_relaxed<A>(out) == 0 && clock_ns() - start < 10000000000) poll_pause();
    out[thread_index() + 32] = 1;
    """
    schedule = Schedule(ns_per_poll=100_000)
    out = torch.zeros(64)
    run(load(kernel(body)), "kernel", 1, 32, 0, [out], schedule)
    assert (out[32:] == 1).all()


def test_a_wait_that_never_yields_is_ended() -> None:
    with pytest.raises(Failure, match="poll_pause") as raised:
        launch("while (load_relaxed<A>(out) == 0);", timeout=1)
    assert raised.value.kind == "timeout"


def test_arguments_keep_their_types_and_views_their_storage() -> None:
    parameters = "int small, long long big, float real, float *all, float *part"
    text = kernel(
        "if (thread_index()) return; all[0] = small; all[1] = big == (1ll << 40); all[2] = real; part[0] = 5;",
        parameters,
    )
    data = torch.zeros(8)
    run(load(text), "kernel", 1, 32, 0, [-3, 1 << 40, 0.5, data, data[4:]])
    assert data.tolist() == [-3, 1, 0.5, 0, 5, 0, 0, 0]


def test_a_run_returns_the_sites_that_it_reached() -> None:
    text = kernel("if (out[0] == 1) block_sync<A>(); else block_sync<C>();")
    assert run(load(text), "kernel", 1, 32, 0, [torch.zeros(1)]) == {2}
    assert run(load(text), "kernel", 1, 32, 0, [torch.ones(1)]) == {0}
