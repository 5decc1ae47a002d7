# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks call right: of all elements together, and of each."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import gpu_rnn
from benchmarks import run
from benchmarks.cases import comparison, options, problems, variants
from benchmarks.measuring import checking
from gpu_rnn.backends.step import launch as step


def flipped(value: torch.Tensor) -> torch.Tensor:
    """With the sign of one element changed, of one that is as large as most are."""
    found = value.clone()
    flat = found.view(-1)
    size = flat.double().square().mean().sqrt()
    flat[(flat.abs() - size).abs().argmin()] *= -1
    return found


LARGE = problems.named("LSTM", T=128, B=32, H=64)  # 2 of 262,144 elements' root mean square are 0.4 % of their norm


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_one_wrong_element_of_many_is_refused(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = step.forward

    def wrong(*arguments: Any) -> Any:
        result = forward(*arguments)
        return result._replace(y=flipped(result.y))

    out, arguments = tmp_path / "rows.csv", f"--device cpu --set tiny --dtype {dtype} --trials 1 --backend step"
    given = [*arguments.split(), "--direction", "forward", "--out", str(out)]
    monkeypatch.setitem(problems.SETS, "tiny", (LARGE,))
    assert run.main(given) == 0
    monkeypatch.setattr(step, "forward", wrong)
    assert run.main(given) == 1
    _, row = csv.DictReader(out.read_text().splitlines())
    assert row["status"] == "wrong" and row["detail"].startswith("an element of y is off by ")


@pytest.mark.parametrize("name", ["y", "d_x", "d_weight_hh_l0"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "ieee"])
def test_an_element_of_every_output_and_gradient_is_seen(name: str, dtype: str) -> None:
    class Wrong(variants.Variant):
        def results(self, inputs: variants.Inputs) -> variants.Outputs:
            found = super().results(inputs)
            return found | {name: flipped(found[name])}

    case = variants.Case("tiny", LARGE, dtype, "training")
    (side,) = comparison.build(case, torch.device("cpu"), ["step"]).sides
    theirs, ours = side.variants
    exact = checking.exact(side.truth, side.inputs, 0)
    limits = checking.Limits(dtype)
    limits.widen(checking.errors(theirs, side.inputs, exact, 0))
    found = checking.errors(ours, side.inputs, exact, 0)
    assert all(error <= limits.allowed("step", each) for each, error in found.items())
    found = checking.errors(Wrong(**vars(ours)), side.inputs, exact, 0)
    assert limits.worst("step", found) == f"an element of {name}"
    assert found[f"an element of {name}"] > limits.allowed("step", f"an element of {name}")
    for each in exact.keys() - {name}:
        assert found[f"an element of {each}"] <= limits.allowed("step", f"an element of {each}")


@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf])
def test_no_limit_allows_what_is_no_number(odd: float) -> None:
    truth = torch.ones(1000, dtype=torch.float64)
    found = truth.float()
    found[7] = odd
    errors = checking.distances({"y": found}, {"y": truth})
    assert all(error == math.inf for error in errors.values())
    limits = checking.Limits("bf16")
    limits.widen(errors)  # of a yardstick that is refused itself
    assert not any(
        error <= limits.allowed(name, each) for name in ("torch.nn", "step") for each, error in errors.items()
    )


def test_the_check_leaves_torch_and_the_layers_as_they_were() -> None:
    case = variants.Case("tiny", problems.SETS["tiny"][0], "fp32", "training")
    settings = (torch.backends.cudnn.rnn, torch.backends.cuda.matmul)  # of peers' products, too
    before, mask = [each.fp32_precision for each in settings], gpu_rnn.layers.regularization.recurrent_mask
    for dtype, precision in {"ieee": "ieee", "fp32": "tf32"}.items():
        with checking.products_as(variants.Case("tiny", case.problem, dtype, "forward")):
            assert {each.fp32_precision for each in settings} == {precision}
    with checking.products_as(case):
        (side,) = comparison.build(case, torch.device("cpu"), ["step"]).sides
        exact = checking.exact(side.truth, side.inputs, 0)
        names = {"y", "state 1", "d_x", "d_weight_hh_l0"}
        assert checking.errors(side.variants[0], side.inputs, exact, 0).keys() >= names
    assert not torch.are_deterministic_algorithms_enabled()
    assert [each.fp32_precision for each in settings] == before
    assert gpu_rnn.layers.regularization.recurrent_mask is mask


def test_masks_of_the_check_are_drawn_in_one_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(like: torch.Tensor, probability: float, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.full(shape, float(like.dtype == torch.float32), dtype=like.dtype)  # a GPU's draws differ by dtype

    monkeypatch.setattr(gpu_rnn.layers.regularization, "recurrent_mask", drawn)
    with options.same_masks(0):
        for dtype in (torch.bfloat16, torch.float64):
            mask = gpu_rnn.layers.regularization.recurrent_mask(torch.empty(1, dtype=dtype), 0.5, (2, 3))
            assert mask.dtype == dtype and bool((mask == 1).all())


@pytest.mark.parametrize("option", ["recurrent_dropout_per_gate", "zoneout"])
def test_other_random_masks_are_refused(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problems.named("LSTM", T=5, B=3, H=16, option=option)
    case = variants.Case("tiny-options", problem, "fp32", "training")
    side = comparison.build(case, torch.device("cpu"), ["step"]).sides[1]
    exact = checking.exact(side.truth, side.inputs, 1)
    same, other = (max(checking.errors(side.variants[0], side.inputs, exact, seed).values()) for seed in (1, 2))
    assert same < 1e-5 and other > 0.1


@pytest.mark.parametrize("option", ["peephole", "layer_norm"])
def test_what_is_right_is_right_after_many_steps(option: str) -> None:
    """Large scales and peepholes make a layer chaotic: then plain PyTorch in bf16 is as wrong as everything else."""
    case = variants.Case("options", problems.named("LSTM", T=128, B=16, H=64, option=option), "bf16", "training")
    torch.manual_seed(0)
    side = comparison.build(case, torch.device("cpu"), ["step", "reference"]).sides[1]
    exact, limits = checking.exact(side.truth, side.inputs, 0), checking.Limits("bf16")
    for variant in side.variants:
        found = checking.errors(variant, side.inputs, exact, 0)
        worst = limits.worst(variant.name, found)
        assert found[worst] < limits.allowed(variant.name, worst) / 2, (variant.name, worst, found[worst])


def test_an_option_is_no_option_of_torch_nn() -> None:
    problem = problems.named("GRU", T=5, B=3, H=16, option="reset_before")
    case = variants.Case("tiny-options", problem, "fp32", "forward")
    theirs, ours = comparison.build(case, torch.device("cpu"), ["step"]).sides
    assert [variant.name for variant in theirs.variants] == ["torch.nn"] and theirs.yardstick == "torch.nn"
    assert [variant.name for variant in ours.variants] == ["step"] and ours.yardstick == "reference"
    default, option = (checking.exact(side.truth, side.inputs, 0)["y"] for side in (theirs, ours))
    assert (default - option).norm() > 1e-3 * default.norm()


def test_graphs_are_captured_before_new_memory_is_poisoned() -> None:
    poisoned = []

    class OnGPU(variants.Inputs):
        x = type("x", (), {"is_cuda": True})()  # type: ignore[assignment]

        def __init__(self) -> None: ...

    class Noted(variants.Variant):
        def call(self, inputs: variants.Inputs) -> Callable[[], tuple[torch.Tensor, ...]]:
            # type: ignore[func-returns-value]
            return lambda: poisoned.append(torch.are_deterministic_algorithms_enabled()) or (torch.ones(1),)

        def results(self, inputs: variants.Inputs) -> dict[str, torch.Tensor]:
            return {"y": self.call(inputs)()[0]}

    assert {*checking.errors(Noted("step", lambda x: (x,), {}), OnGPU(), {"y": torch.ones(1)}, 0).values()} == {0}
    assert poisoned == [False, False, True]  # backends/step/cuda_graphs.py captures at a shape's second call
