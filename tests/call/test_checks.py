# SPDX-License-Identifier: Apache-2.0
"""The registered operations refuse tensors that do not fit, on every backend and before it; each test is one of
`BACKENDS`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gpu_rnn import cells
from gpu_rnn.backends.axes import axes_of
from gpu_rnn.backends.tensors import (
    FIRST_CONTROL,
    RESULT_AXES,
    ROW_AXES,
    WEIGHTS,
    Inputs,
    LayerControls,
    Result,
    Weights,
)
from gpu_rnn.call import checks
from gpu_rnn.call.passes import Options
from tests.support import native
from tests.support.op_calls import (
    CALLS,
    ROW,
    B,
    G,
    H,
    I,
    N,
    S,
    T,
    arguments,
    full,
    normalised,
    projected,
    simple,
    stacked,
    with_lengths,
)


def run(call: dict[str, Any]) -> list[Tensor]:
    return torch.ops.gpu_rnn.rnn(*arguments(call))


def run_backward(call: dict[str, Any], d_outputs: list[Tensor], saved: list[Tensor]) -> list[Tensor]:
    return torch.ops.gpu_rnn.rnn_backward(d_outputs, saved, *arguments(call))


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_calls_that_fit_pass(call: Callable[[], dict[str, Any]]) -> None:
    given = call()
    y, h, c, *saved = run(given)
    assert all(t.isfinite().all() for t in (y, h, c))
    assert len(run_backward(given, [y, h, c], [y, *saved])) == FIRST_CONTROL + S + len(given["reset_values"])


def mutations(tensor: Tensor, first: int = 0) -> list[Tensor]:
    """The same tensor longer and shorter by one along each axis, with an axis more and one less, and of other
    dtypes."""
    found = [tensor[None], tensor.sum(0).to(tensor.dtype), tensor.to(torch.float64), tensor.to("meta")]
    if tensor.dtype != torch.int32:
        found.append(tensor.to(torch.int32))
    for axis in range(first, tensor.dim()):
        longer = torch.cat([tensor, tensor.narrow(axis, 0, 1)], axis)
        found += [longer, tensor.narrow(axis, 0, tensor.shape[axis] - 1)]
    return found


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_every_tensor_of_another_shape_dtype_or_device_is_refused(call: Callable[[], dict[str, Any]]) -> None:
    """By name; x and w_hh also give the sizes, so that another may be named in their place."""
    for name in ROW:
        value = call().get(name)
        for place in range(len(value)) if isinstance(value, list) else [None]:
            tensor = value if place is None else value[place]
            for wrong in mutations(tensor, first=int(name == "x")) if tensor is not None else []:  # any T is as good
                given = call()
                if place is None:
                    given[name] = wrong
                else:
                    given[name][place] = wrong
                with pytest.raises((ValueError, TypeError, RuntimeError), match=r"^gpu_rnn::rnn: \w+") as caught:
                    run(given)
                named = str(caught.value).split()[1].split("[")[0]
                other = name in ("x", "w_hh", "w_hr", "w_between") or wrong.is_meta
                assert named == name or other, (name, str(caught.value))


def test_every_field_has_axes() -> None:
    """A new tensor is checked, or the table says that it is not."""
    assert set(checks.TENSORS) == {*Weights._fields, *LayerControls._fields}
    assert set(checks.LISTS) == set(Inputs._fields) - {"weights", "controls"}
    assert {*checks.SAVED_AXES, "final"} == set(Result._fields) - {"kept"}
    assert len(ROW_AXES) == len(ROW)


def test_places_of_axes() -> None:
    """vmap folds into these, which are read from the fields' annotations."""
    of_controls = [axes_of(LayerControls)[name][0] for name in ("lengths", "flags", "drop", "zone", "between")]
    assert [axes.place("B") for axes in of_controls] == [0, 1, 0, 2, 2]
    assert [axes.place("N") for axes in of_controls] == [None, 2, 1, 3, None]
    assert [axes.place("B") for axes in ROW_AXES[: 1 + WEIGHTS]] == [1, *[None] * WEIGHTS]
    assert [axes.place("N") for axes in ROW_AXES[:WEIGHTS]] == [2, *[0] * (WEIGHTS - 1)]  # all but w_between, the last
    assert [[axes.place(axis) for axes in ROW_AXES[-2:]] for axis in "BN"] == [[0, 1], [1, 2]]
    assert [axes.place("B") for axes in RESULT_AXES] == [1, 0, 1, 1, 2, 2, 2]
    assert [axes.place("N") for axes in RESULT_AXES] == [2, 1, 2, 2, 3, 3, 3]


TOGETHER: dict[str, tuple[Callable[[], dict[str, Any]], dict[str, Any], str]] = {
    "no states": (simple, {"states": []}, "states has a tensor for each of 2 states, got 0"),
    "three states": (simple, {"states": [torch.zeros(B, N, H)] * 3}, "2 states, got 3"),
    "one reset value": (full, {"reset_values": [torch.zeros(1, B, N, H)]}, "reset_values has a tensor for each of 2"),
    "one bias": (simple, {"b_hh": None}, "b_ih and b_hh come together"),
    "one scale": (normalised, {"norm": None}, "norm and norm_ih come together"),
    "no parameters": (full, {"params": None}, r"params holds the program's per-unit parameters \(i, f, o\)"),
    "parameters of none": (simple, {"params": torch.zeros(N, 0, H)}, "it has none"),
    "lengths and flags": (full, {"lengths": torch.tensor([1, 2, 3])}, "lengths and flags do not come together"),
    "reset values alone": (full, {"flags": None}, "reset_values come with flags"),
    "between alone": (simple, {"between": torch.zeros(1, T, B, H)}, "between comes with w_between"),
    "no steps": (simple, {"x": torch.zeros(0, B, I)}, "x has time steps"),
    "a stack backwards": (stacked, {"options": "auto 01 save y"}, "run forwards, got 01"),
    "a program of other gates": (simple, {"text": cells.gru(activation="softsign").program.text}, r"w_ih \(M G H I\)"),
    "directions": (simple, {"options": "auto 0 save y"}, r"w_ih \(M G H I\) is \(1, 4, 5, 2\), got \(2, 4, 5, 2\)"),
    "many directions": (simple, {"options": "auto " + "01" * 1000 + " save y"}, r"is \(2000, 4, 5, 2\)"),
}


@pytest.mark.parametrize("name", TOGETHER)
def test_what_does_not_go_together_is_refused(name: str) -> None:
    call, wrong, words = TOGETHER[name]
    with pytest.raises(ValueError, match="gpu_rnn::rnn: .*" + words):
        run(call() | wrong)


@pytest.mark.parametrize(
    "options", ["auto", "", "auto xyz save y", "auto 2 save y", "auto 0 keep y", "auto 0 save y y", "auto  save y"]
)
def test_options_that_are_none_are_refused(options: str) -> None:
    with pytest.raises(ValueError, match=r"the options of a layer read like 'auto 01 save y'"):
        run(simple() | {"options": options})
    with pytest.raises(ValueError, match=r"the options of a layer"):
        Options.decode(options)


def test_a_backend_or_program_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="backend must be 'auto' or one of"):
        run(simple() | {"options": "foo 01 save y"})
    with pytest.raises(ValueError, match="line 1 of a recurrence's program"):
        run(simple() | {"text": "x"})


@pytest.mark.parametrize("call", [simple, projected, stacked], ids=lambda c: c.__name__)
def test_what_a_backward_pass_is_given_is_checked_too(call: Callable[[], dict[str, Any]]) -> None:
    given = call() | {"options": call()["options"].replace("save y", "save all")}
    y, h, c, *saved = run(given)
    d_outputs, saved = [y, h, c, saved[-1]], [y, *saved]
    assert run_backward(given, d_outputs, saved)
    for tensors in (d_outputs, saved):
        for place, tensor in enumerate(list(tensors)):
            for wrong in mutations(tensor) if tensor.numel() else []:
                tensors[place] = wrong
                with pytest.raises((ValueError, TypeError, RuntimeError), match=r"^gpu_rnn::rnn_backward: \w+"):
                    run_backward(given, d_outputs, saved)
            tensors[place] = tensor
        for wrong in (tensors[:-1], [*tensors, tensors[0]]):
            with pytest.raises(ValueError, match=r"^gpu_rnn::rnn_backward: (saved|d_outputs)"):
                run_backward(given, *((wrong, saved) if tensors is d_outputs else (d_outputs, wrong)))
    with pytest.raises(ValueError, match=r"^gpu_rnn::rnn_backward: b_ih"):
        run_backward(given | {"b_ih": torch.zeros(1)}, d_outputs, saved)


def test_what_was_not_saved_is_computed_again() -> None:
    given = simple()
    y, h, c, *saved = run(given)
    nothing = [y, torch.empty(0), torch.empty(0), torch.empty(0)]
    for own, other in zip(
        run_backward(given, [y, h, c], [y, *saved]), run_backward(given, [y, h, c], nothing), strict=True
    ):
        torch.testing.assert_close(own, other)


BACKENDS = ["reference", "step", native.BACKEND, pytest.param("resident", marks=pytest.mark.interpreter)]


@pytest.mark.parametrize("reverse", ["0", "1"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_lengths_out_of_range_are_clamped(backend: str, reverse: str) -> None:
    """To look at them would make a GPU's host wait; what they lead to may not lie beyond a tensor."""
    given = with_lengths() | {"options": f"{backend} {reverse} save y", "w_ih": torch.randn(1, G, H, I)}
    given |= {name: given[name][:1] for name in ("w_hh", "b_ih", "b_hh")} | {"states": [torch.zeros(B, 1, H)] * 2}
    wild, tame = (given | {"lengths": torch.tensor(each)} for each in ([400_000, -400_000, 2], [T, 0, 2]))
    found, expected = run(wild), run(tame)
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, equal_nan=True)
    d = [torch.ones_like(t) for t in found[:3]]
    for own, other in zip(
        run_backward(wild, d, [found[0], *found[3:]]), run_backward(tame, d, [expected[0], *expected[3:]]), strict=True
    ):
        torch.testing.assert_close(own, other)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["resident", "group", "step", "reference"])
def test_lengths_on_a_gpu_are_clamped_without_a_wait(backend: str) -> None:
    given = with_lengths() | {"options": f"{backend} 01 drop y"}
    given = {name: value.cuda() if isinstance(value, Tensor) else value for name, value in given.items()}
    given["states"] = [state.cuda() for state in given["states"]]
    given["lengths"] = torch.tensor([400_000, -400_000, 2], device="cuda")
    expected = run(given | {"lengths": torch.tensor([T, 0, 2], device="cuda")})  # compiles, too
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = run(given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(found, expected)
