# SPDX-License-Identifier: Apache-2.0
"""The group kernel on the CPU runtime, against the float64 reference."""

import os
import shutil
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

from benchmarks.emulating import build
from benchmarks.emulating.build import shuffled, starve
from gpu_rnn import Recurrence, devices
from gpu_rnn.backends import reference
from gpu_rnn.backends.group import deadline
from gpu_rnn.backends.group import launch as group
from gpu_rnn.backends.group.layout import source
from gpu_rnn.backends.problem import Problem
from gpu_rnn.backends.tensors import SKIP
from tests.support import group as support
from tests.support.cuda import sites
from tests.support.group import (
    PRECISIONS,
    RECURRENCES,
    SETS,
    Case,
    assert_close,
    cases,
    expected_forward,
    expected_gradients,
    forward,
    gradients,
    gradients_at,
    has_kinks,
    named,
    only_where_used,
    pairs_of_options,
    relative_error,
    run_on_cpu,
    steered_cases,
    truth_and_plain,
)

pytestmark = [
    pytest.mark.cuda_cpu,
    pytest.mark.skipif(
        shutil.which("g++") is None, reason="g++ is not installed; it builds the CUDA sources for the CPU"
    ),
]
CLUSTERS = [
    Case("lstm", "fp16", 2, along=2, T=7, B=13, lengths=True, cluster=True),
    Case("gru", "bf16", 3, along=3, tiles=2, B=33, groups=2, reverse="01", cluster=True),
    Case("rnn", "tf32", 8, B=3, columns=2, held=0, cluster=True),
    Case("peephole_lstm", "fp32", 2, across=2, blocks=2, tiles=2, B=40, cluster=True),  # rounds over the batch
    Case("slstm", "fp16", 3, T=1, cluster=True),
    Case("lstm", "bf16", 2, T=5, cluster=True, options=("mask", "reset_values", "drop_per_gate", "zone", "all_states")),
]
(PLAIN, MORE), (STEERED, AGAIN) = cases(), steered_cases()
CASES = [
    *PLAIN,
    *STEERED,
    *CLUSTERS,
    *(pytest.param(case, marks=pytest.mark.slow) for case in [*MORE, *AGAIN, *pairs_of_options()]),
]
WATCHED = [  # under ThreadSanitizer
    Case("lstm", "bf16", 1, across=2, blocks=2, along=2, T=4),
    Case("gru", "fp16", 3, along=3, tiles=2, B=12, T=9, lengths=True, period=2, joins=2),
    Case("lstm", "fp32", 2, T=7, reverse="01"),
    Case("rnn", "tf32", 2, across=2, blocks=2, along=2, T=7, period=2),
    Case("gru", "bf16", 3, along=3, counter=True, T=6),
    Case("gru_reset_before", "bf16", 2, along=2, tiles=2, B=12, T=5),
    Case("gru", "fp16", 2, along=2, T=4, options=("norm",)),
    Case("lstm", "bf16", 2, T=4, options=("mask", "reset_values", "drop_per_gate", "zone", "all_states")),
    Case("lstm", "fp16", 3, along=3, tiles=2, B=12, T=6, cluster=True),
]


def check_forward(case: Case, **options) -> None:
    inputs = case.inputs()
    result, error = forward(case, inputs, **options)
    assert not error.item()
    found, truth, plain = (
        only_where_used(named(r), inputs)
        for r in (result, expected_forward(case, inputs), expected_forward(case, case.plain(inputs)))
    )
    assert_close(case, found, truth, plain)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(case):
    check_forward(case)


def check_gradients(case: Case, **options) -> None:
    inputs = case.inputs()
    saved, _ = forward(case, inputs, **options)
    assert_close(case, gradients(case, inputs, saved, **options), *truth_and_plain(case, inputs, saved))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients(case):
    check_gradients(case)


@pytest.mark.parametrize("options", [(), *SETS], ids="+".join)
def test_gradients_at_exact_values_are_the_references(options):
    """What judges rounded kernels of a cell with kinks; and no other cell is judged so."""
    case = Case("slstm", "fp32", 1, reverse="01", lengths=not options, options=options)
    inputs = case.inputs()
    found, truth = gradients_at(case, inputs, expected_forward(case, inputs)), expected_gradients(case, inputs)
    assert found.keys() == truth.keys()
    assert max(relative_error(found[name], exact) for name, exact in truth.items()) < 1e-14  # float64: 45 ulps
    assert {cell for cell in RECURRENCES if has_kinks(replace(case, cell=cell))} == {"slstm"}


@pytest.mark.parametrize("case", WATCHED, ids=str)
def test_gradients_are_free_of_races(case):
    check_gradients(case, sanitizer="thread", schedule=shuffled(1, latest=0))
    check_gradients(case, sanitizer="thread", schedule=starve(case.members - 1))
    check_gradients(case, schedule=shuffled(2))


@pytest.mark.parametrize("case", WATCHED, ids=str)
def test_forward_is_free_of_races(case):
    check_forward(case, sanitizer="thread", schedule=shuffled(1, latest=0))
    check_forward(case, sanitizer="thread", schedule=starve(case.members - 1))
    check_forward(case, schedule=shuffled(2))  # stores leave late, and out of order


def test_both_stay_in_their_buffers():
    check_gradients(Case("lstm", "fp16", 2, T=5, B=13, lengths=True, along=2), sanitizer="address")


@pytest.mark.parametrize("H, precision, members", [(20, "bf16", 1), (128, "tf32", 8)])
def test_launchers_run_what_they_choose(H, precision, members, monkeypatch):
    """`forward` and `backward` as dispatch calls them, with only the driver's call replaced."""
    monkeypatch.setattr(group.Launch, "run", lambda launch, device: run_on_cpu([launch]))
    case = Case("peephole_lstm", precision, 1, H=H, T=3, reverse="01", lengths=True)
    inputs = case.inputs()
    low = inputs.to(PRECISIONS[precision][0])
    recurrence = RECURRENCES[case.cell]
    problem = Problem(
        recurrence=recurrence,
        T=3,
        B=case.B,
        N=2,
        I=3,
        H=H,
        dtype=low.x.dtype,
        device_type="cuda",
        device=devices.describe("H100"),
        direction="training",
        precision="tf32",
        reverse="01",
    )
    assert group.choose(problem).layout.members == members
    with torch.no_grad():
        gates = reference.project(low.x, low.weights, recurrence.program).contiguous()
        saved = group.forward(low.detached().call(recurrence, problem), gates, True, False)
        backward = low.detached().call(recurrence, replace(problem, direction="backward"))
        found = group.backward(backward, saved, saved.y, saved.final, None)
    expected = [expected_forward(case, given) for given in (inputs, case.plain(inputs))]
    assert_close(case, *(only_where_used(named(r), inputs) for r in (saved, *expected)))
    assert all(gradient.isfinite().all() for gradient in (*found[:2], *found.d_states, found.d_params))
    assert found.d_params.shape == low.weights.params.shape


def test_inference_saves_nothing():
    case = Case("gru", "bf16", 2, save=False, lengths=True)
    result, _ = forward(case, case.inputs())
    assert not any(t.numel() for t in (result.gates, result.recurrent, result.inner))
    check_forward(case)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_what_masked_steps_are_given_does_not_matter(cell):
    """Neither to outputs nor to gradients, NaN included."""
    case = Case(cell, "fp32", 2, reverse="1", options=("mask", "resets"))
    skipped = (case.inputs().controls.flags & SKIP).bool()
    found = []
    for value in (0.0, torch.nan):
        inputs = case.inputs()
        with torch.no_grad():
            inputs.x[skipped[..., 0]] = value
        results = named(forward(case, inputs)[0])
        found.append({"y": results["y"], "h": results["final 0"]} | gradients(case, inputs))
    weights = found[1].pop("d w_ih"), found[0].pop("d w_ih")  # a product with x itself, masked by nobody
    assert weights[0].isnan().any()
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name
    assert not found[0]["d x"][skipped[..., 0]].any()


def test_inference_gives_all_states_where_wanted():
    case = Case("lstm", "bf16", 2, save=False, options=("all_states",))
    result, _ = forward(case, case.inputs())
    assert result.inner.numel() and not any(t.numel() for t in (result.gates, result.recurrent))
    check_forward(case)


def test_words_that_look_empty_arrive_as_nan():
    """A NaN in one row stays in that row, whatever its bits, and nobody waits for it."""
    case = Case("lstm", "fp16", 2, T=4)
    inputs = case.inputs()
    with torch.no_grad():
        inputs.states[0][2] = torch.nan
    result, error = forward(case, inputs)
    assert not error.item()
    assert result.y[:, 2].isnan().all() and result.y[:, [0, 1, 3, 4]].isfinite().all()


SHORT = "0.002"  # seconds of virtual time; a member that never starts is waited for 60 times as long

WAITING = """
extern "C" __global__ void waits(unsigned *left, unsigned long long *error, unsigned long long *took,
                                 unsigned long long limit, int number) {
  Watch watch = {left, left + 1, error, limit, 0, 7, 0, 0, true};
  watch.start();
  const unsigned long long before = clock_ns();
  while (watch.alive)
    watch.poll(number);
  if (thread_index() == 0)
    took[0] = clock_ns() - before;
}
"""


@pytest.mark.parametrize(("number", "times"), [(0, 60), (1, 1), (5, 1)])
def test_who_has_not_started_is_waited_for_longer(number: int, times: int) -> None:
    """As beside a kernel of NCCL that holds multiprocessors until another process comes."""
    program = build.load(source(Case("lstm", "fp16", 2).layout(False)) + WAITING)
    left, error, took = (
        torch.zeros(2, dtype=torch.int32),
        torch.zeros(1, dtype=torch.int64),
        torch.zeros(1, dtype=torch.int64),
    )
    limit = 4_000_000  # ns; the clock is looked at every 1,024 polls of 32 threads, which take 1,000 ns each
    build.run(program, "waits", 1, 32, 65536, [left, error, took, limit, number])
    assert error.item() & 0xFFFFFFFF == number and left[0] == 1
    assert times * limit <= took.item() <= times * limit + 2 * 1024 * 32 * 1_000


SIGMOIDS = """
extern "C" __global__ void sigmoids(const float *in, int count, float *out) {
  for (int i = thread_index(); i < count; i += block_threads())
    out[i] = sigmoidf(in[i]);
}
"""


@pytest.mark.parametrize(("precision", "bound"), [("fp16", 2.7e-7), ("tf32", 2.7e-7), ("fp32", 1.2e-7)])
def test_sigmoid_is_near_float64(precision: str, bound: float) -> None:
    """Special functions that are off by all that the PTX ISA allows; in full fp32 there are none."""
    x = torch.cat([torch.linspace(-120, 120, 100_001), torch.linspace(-4, 4, 100_001)])
    x, found = torch.cat([x, torch.tensor([torch.inf, -torch.inf, torch.nan])]), torch.zeros(len(x) + 3)
    program = build.load(source(Case("lstm", precision, 1).layout(False)) + SIGMOIDS)
    build.run(program, "sigmoids", 1, 32, 0, [x, len(x), found])
    torch.testing.assert_close(found.double(), torch.sigmoid(x.double()), rtol=0, atol=bound, equal_nan=True)


def missing_member(case: Case, **options) -> None:
    """One block is not there: the others leave in time, and say so."""
    with patch.dict(os.environ, GPU_RNN_DEADLINE=SHORT):
        result, error = forward(case, case.inputs(), grid=case.members - 1, **options)
    assert error.item() and result.y.isnan().all()


def late_member(case: Case, **options) -> None:
    """A block of a cluster comes too late, so all give up and say so, and none leaves before the others."""
    options["schedule"] = starve(1, patience=5_000)
    with patch.dict(os.environ, GPU_RNN_DEADLINE=SHORT):
        result, error = forward(case, case.inputs(), **options)
    assert error.item() and result.y.isnan().all()


CONFIGURATIONS = {  # each of which notices by itself the loss of every synchronisation that it reaches
    "alone": (check_forward, Case("lstm", "fp16", 1, across=2, blocks=2, along=2, T=3)),
    "ahead": (check_forward, Case("gru", "fp16", 3, along=3, T=12, tiles=2, B=12, period=2, joins=2)),
    "ahead backward": (check_gradients, Case("gru", "bf16", 3, along=3, T=9, tiles=2, B=12, period=2, joins=2)),
    "counter": (check_forward, Case("gru", "fp16", 2, along=2, T=4, counter=True)),
    "backward": (check_gradients, Case("rnn", "bf16", 2, along=2, T=6)),
    "two products": (check_forward, Case("gru_reset_before", "fp16", 2, along=2, T=6)),
    "two products backward": (check_gradients, Case("gru_reset_before", "fp16", 2, along=2, T=6)),
    "sums": (check_forward, Case("lstm", "fp16", 2, along=2, T=6, options=("norm",))),
    "sums backward": (check_gradients, Case("lstm", "fp16", 2, along=2, T=6, options=("norm",))),
    "cluster": (check_forward, Case("gru", "fp16", 2, along=2, T=6, cluster=True)),
    "cluster of tiles": (check_forward, Case("lstm", "fp16", 3, along=3, T=6, tiles=2, B=12, cluster=True)),
    "cluster backward": (check_gradients, Case("gru", "fp16", 2, along=2, T=6, cluster=True)),
}


def site_case(check, case: Case) -> sites.Case:
    def run(sanitizer, schedule, disabled) -> set[int]:
        reached: set[int] = set()
        check(case, sanitizer=sanitizer, schedule=schedule, disabled_sites=disabled, reached=reached)
        return reached

    return run


def site_cases() -> dict[str, sites.Case]:
    """What notices the loss of each synchronisation, for support/cuda/sites.py: case(sanitizer, schedule, disabled)."""
    kernels = {name: CONFIGURATIONS[name] for name in ("alone", "ahead", "counter", "backward", "sums", "cluster")}
    kernels["missing"] = missing_member, Case("lstm", "fp32", 4, T=2)
    kernels["late"] = late_member, Case("rnn", "bf16", 2, T=4, B=3, cluster=True)
    return {name: site_case(*kernel) for name, kernel in kernels.items()}


def test_every_synchronisation_is_needed():
    report = sites.check(sites.kernel_text(), site_cases())
    assert report.good, report


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_every_configuration_needs_its_synchronisation(name):
    assert not sites.unnoticed(sites.kernel_text(), site_case(*CONFIGURATIONS[name]))


@pytest.mark.parametrize("counter", [False, True], ids=["words", "counter"])
@pytest.mark.parametrize("cell", ["lstm", "closing"])
def test_data_that_never_comes_ends_in_an_error(cell, counter, monkeypatch):
    """All outputs are NaN, of a cell that hides NaN too, and somebody says so."""
    closing = Recurrence(lambda x, r, s: torch.where(x.a + r.a > 0, x.a + r.a, 0), gates=("a",), name="closing")
    monkeypatch.setitem(RECURRENCES, "closing", closing)
    monkeypatch.setenv("GPU_RNN_DEADLINE", SHORT)
    case = replace(Case(cell, "fp32", 3, T=4, reverse="01", along=3), counter=counter)
    result, error = forward(case, case.inputs(), grid=5)  # one member of the second group is missing
    assert all(value.isnan().all() for value in named(result).values())
    monkeypatch.setattr(deadline, "_errors", {torch.device("cpu"): error})
    with pytest.raises(
        RuntimeError, match=rf"group_forward of {cell} \(T 4, B 5, N 2, H 46, .*gave up in step 0 of group 1"
    ):
        deadline.check()
    deadline.check()  # said once


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_a_cluster_that_waits_in_vain_leaves_together(backward, monkeypatch):
    """A block is late beyond the deadline; those who gave up are there until it has sent its last word."""
    case = Case("gru", "bf16", 3, T=5, along=3, tiles=2, B=16, cluster=True)
    if not backward:
        return late_member(case)
    saved, _ = forward(case, case.inputs())
    monkeypatch.setenv("GPU_RNN_DEADLINE", SHORT)
    with pytest.raises(AssertionError) as raised:  # of the error word
        gradients(case, case.inputs(), saved, schedule=starve(1, patience=5_000))
    assert not isinstance(raised.value, build.Failure)


@pytest.mark.parametrize("cell", ["gru", "peephole_lstm"])
def test_gradients_whose_data_never_comes_are_nan(cell, monkeypatch):
    found = []

    def run(launches, **options):
        for launch in launches:
            backward = launch.layout.backward
            run_on_cpu([replace(launch, grid=launch.grid - backward)], **options)
            gradients_of = ("p_d_gates", "p_d_recurrent", "p_d_initial", "p_d_params", "p_d_values")
            found.extend(launch.arguments[name] for name in gradients_of if backward)

    monkeypatch.setattr(support, "run_on_cpu", run)
    monkeypatch.setenv("GPU_RNN_DEADLINE", SHORT)
    case = Case(cell, "bf16", 3, T=3, options=("reset_values",))
    with pytest.raises(AssertionError):  # of the error word
        gradients(case, case.inputs())
    assert len(found) == 5 and all(value.isnan().all() for value in found)
