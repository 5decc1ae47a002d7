# SPDX-License-Identifier: Apache-2.0
"""Arguments of the CUDA kernels stand by name, and a kernel's own signature orders them."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from gpu_rnn.backends import reference
from gpu_rnn.backends.group import launch as group
from gpu_rnn.backends.group import signature
from gpu_rnn.backends.group.layout import source
from tests.support.group import Case, run_on_cpu
from tests.support.loops import RECURRENCES

CASE = Case("gru", "fp32", 2, T=3)


def launch_of(backward: bool = False) -> group.Launch:
    inputs = CASE.inputs().to(torch.float32).detached()
    call = inputs.call(RECURRENCES[CASE.cell])
    result = reference.forward(call, inputs.x, True, False)
    error = torch.zeros(1, dtype=torch.int64)
    if backward:
        d_final = [torch.ones_like(state) for state in result.final]
        return group.prepare_backward(call, result, result.y, d_final, None, CASE.choice(True), error)[0][0]
    return group.prepare_forward(call, result.gates, True, False, CASE.choice(False), error)[0][0]


@pytest.mark.parametrize("backward", [False, True])
def test_every_parameter_of_a_kernel_is_given(backward: bool) -> None:
    launch = launch_of(backward)
    names = signature.shipped(launch.layout.kernel)
    assert names[:2] == ("p_gates", "p_recurrent") and names[-2:] == ("groups", "launch")
    assert len(names) == (45 if backward else 33) == len(launch.ordered)
    for name, value in zip(names, launch.ordered, strict=True):
        assert value is launch.arguments[name], name


def test_a_permuted_signature_runs_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last pointers first: the kernel gets each argument in the place that its text gives it."""
    text = source(launch_of().layout)
    head, declared, body = re.split(r"(?<=group_forward\()\n(.*?)(?=\) \{)", text, flags=re.S)
    bare = [parameter.strip() for parameter in re.sub(r"//.*", "", declared).split(",")]
    turned = f"{head}{', '.join(reversed(bare))}{body}"
    assert signature.parameters(turned, "group_forward") == signature.shipped("group_forward")[::-1]
    results = []
    for each in (text, turned):
        monkeypatch.setattr("benchmarks.emulating.h100.source", lambda layout, each=each: each)
        names = signature.parameters(each, "group_forward")
        monkeypatch.setattr(signature, "shipped", lambda kernel, names=names: names)
        launch = launch_of()
        run_on_cpu([launch])
        results.append(launch.arguments["p_y"])
    assert results[0].abs().sum() > 0
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_a_missing_and_a_foreign_name_are_named() -> None:
    launch = launch_of()
    missing = {name: value for name, value in launch.arguments.items() if name != "p_b_hh"}
    with pytest.raises(TypeError, match=r"^group_forward lacks p_b_hh: its parameters are p_gates, "):
        _ = replace(launch, arguments=missing).ordered
    with pytest.raises(TypeError, match=r"^group_forward has no p_d_y, p_new: its"):
        _ = replace(launch, arguments=launch.arguments | {"p_d_y": 0, "p_new": 0}).ordered
    with pytest.raises(TypeError, match=r"^group_forward lacks p_b_hh and has no p_bias: its"):
        _ = replace(launch, arguments=missing | {"p_bias": 0}).ordered


def test_a_text_without_the_kernel_is_refused() -> None:
    text = 'extern "C" __global__ void\nother(const float *p_x, int n) {}'
    assert signature.parameters(text, "other") == ("p_x", "n")
    with pytest.raises(ValueError, match="defines no kernel group_forward"):
        signature.parameters(text, "group_forward")
