# SPDX-License-Identifier: Apache-2.0
"""Every option in the step loop, in torch and in Triton, beside the float64 reference: values and all gradients."""

from __future__ import annotations

from itertools import combinations, product

import pytest
import torch

from gpu_rnn import devices
from gpu_rnn.backends import linear, reference, tensors
from gpu_rnn.backends.problem import Problem
from gpu_rnn.backends.step import cuda_graphs, gpu
from gpu_rnn.backends.step import launch as step
from gpu_rnn.backends.tensors import SKIP, bit
from gpu_rnn.call import passes
from tests.support import layer_options
from tests.support import loops as support
from tests.support.pairwise import spread

EXACT, TIGHT = 1e-10, 1e-5  # float64, and float32 against float64 over a few steps
ALL = (*layer_options.OPTIONS, "lengths", *layer_options.FURTHER)
STEERING = {"mask", "resets", "reset_values", "reset_values_per_step"}  # what never comes together with lengths
EXCLUDED = [{"lengths", name} for name in STEERING] + [
    {"drop", "drop_per_gate"},
    {"reset_values", "reset_values_per_step"},
    {"norm", "rms"},
]
SINGLE = [(name,) for name in ALL]
PAIRS = [pair for pair in combinations(ALL, 2) if set(pair) not in EXCLUDED]
EVERYTHING = ("mask", "resets", "reset_values_per_step", "drop_per_gate", "zone", "all_states", "norm")
LEAKING = [(), *SINGLE[1 : len(layer_options.OPTIONS)], ("norm",), ("rms",), EVERYTHING[1:]]
CELLS = tuple(support.RECURRENCES)
ALONE = list(product(CELLS, [*SINGLE, EVERYTHING]))
PROJECTED = ("lstm", "peephole_lstm", "coupled_lstm", "slstm")
Options = tuple[str, ...]

pytestmark = pytest.mark.usefixtures("uninitialised_memory_is_nan")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of a few steps, and some left over, in both loops and in the input products."""
    monkeypatch.setattr(tensors, "CPU_CHUNK", 50)
    chunks = cuda_graphs.Chunks

    def get(key: tuple, make, like: torch.Tensor) -> cuda_graphs.Chunks:  # type: ignore[no-untyped-def, type-arg]
        return chunks(make(2), 2)

    if cuda_graphs.triton_interpreter.INTERPRETING:
        monkeypatch.setattr(chunks, "get", get)


def said(part: object) -> str:
    return "-".join(part) if isinstance(part, tuple) else str(part)


def make(name: str, options: Options, reverse: str = "01", **sizes: int) -> support.Inputs:
    recurrence = support.RECURRENCES[name]
    inputs = support.make(recurrence, reverse=reverse, **sizes)  # type: ignore[arg-type]
    if "lengths" in options:
        lengths = torch.tensor([sizes.get("T", 5), 0, 3])[: sizes.get("B", 3)]
        inputs = inputs._replace(controls=inputs.controls._replace(lengths=lengths))
    return layer_options.with_options(inputs, recurrence, set(options) - {"lengths"})


def in_torch(name: str, options: Options, **sizes: int) -> None:
    inputs, recurrence = make(name, options, **sizes), support.RECURRENCES[name]
    assert not gpu.takes(inputs.x, inputs.call(recurrence))
    expected = support.values_and_gradients(recurrence, inputs, "reference")
    support.assert_same(support.values_and_gradients(recurrence, inputs, "step"), expected, EXACT)


def in_triton(name: str, options: Options, device: str = "cpu", **sizes: int) -> None:
    """Layer normalisation of a few units loses digits: four times what plain PyTorch loses in float32 is allowed."""
    inputs, recurrence = make(name, options, **sizes), support.RECURRENCES[name]
    truth = support.values_and_gradients(recurrence, inputs, "reference")
    narrow = inputs.to(torch.float32)
    plain = support.values_and_gradients(recurrence, narrow, "reference")
    narrow = narrow.on(device)
    assert gpu.takes(narrow.x, narrow.call(recurrence))
    found = support.values_and_gradients(recurrence, narrow, "step")
    assert found.keys() == truth.keys()
    for key, exact in truth.items():
        if not exact.numel():
            continue
        allowed = TIGHT * max(exact.abs().max().item(), 1.0) + 4 * (plain[key].double() - exact).abs().max()
        assert (found[key].double().cpu() - exact).abs().max() <= allowed, key


@pytest.mark.parametrize("options", [*SINGLE, *PAIRS, EVERYTHING], ids="-".join)
@pytest.mark.parametrize("name", CELLS)
def test_in_torch(name: str, options: Options) -> None:
    in_torch(name, options)


@pytest.mark.parametrize("options", [*SINGLE, *PAIRS, EVERYTHING], ids="-".join)
@pytest.mark.parametrize("name", PROJECTED)
def test_with_a_projection(name: str, options: Options) -> None:
    in_torch(name, options, proj=3, reverse="10")  # type: ignore[arg-type]


@pytest.mark.parametrize("sizes", [{"T": 1, "B": 1, "H": 1}, {"B": 0}, {"reverse": "0"}, {"reverse": "011"}], ids=str)
@pytest.mark.parametrize("options", [*SINGLE, EVERYTHING], ids="-".join)
@pytest.mark.parametrize("name", ["lstm", "gru_reset_before"])
def test_sizes(name: str, options: Options, sizes: dict) -> None:  # type: ignore[type-arg]
    in_torch(name, options, **sizes)


@pytest.mark.interpreter
@pytest.mark.parametrize(("name", "options"), spread(ALONE, apart=True), ids=said)
def test_interpreted(name: str, options: Options) -> None:
    in_triton(name, options)


@pytest.mark.interpreter
@pytest.mark.parametrize("options", [(), *SINGLE, EVERYTHING], ids="-".join)
@pytest.mark.parametrize("name", PROJECTED)
def test_with_a_projection_interpreted(name: str, options: Options) -> None:
    in_triton(name, options, H=5, proj=3, reverse="10")  # type: ignore[arg-type]


@pytest.mark.interpreter
@pytest.mark.parametrize("options", PAIRS, ids="-".join)
def test_pairs_interpreted(options: Options) -> None:
    in_triton(CELLS[PAIRS.index(options) % len(CELLS)], options)


@pytest.mark.interpreter
@pytest.mark.parametrize("proj", [0, 3])
@pytest.mark.parametrize("options", [(), EVERYTHING], ids="-".join)
def test_buffers_are_used_again(options: Options, proj: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call finds nothing of the one before it in the buffers, which a graph keeps."""
    kept, chunks = {}, cuda_graphs.Chunks
    monkeypatch.setattr(chunks, "get", lambda key, make, like: kept.setdefault(key, chunks(make(2), 2)))
    for steps in (5, 4, 5):
        in_triton("lstm", options, T=steps, proj=proj)
    assert len(kept) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("options", [*SINGLE, *PAIRS, EVERYTHING], ids="-".join)
@pytest.mark.parametrize("name", ["lstm", "gru", "gru_reset_before"])
def test_on_a_gpu(name: str, options: Options) -> None:
    """More steps than two chunks, so that a captured graph is replayed, and steps left over."""
    torch.backends.cudnn.rnn.fp32_precision = "ieee"
    for _ in range(2):  # the second call replays from its first chunk
        in_triton(name, options, "cuda", T=2 * cuda_graphs.CHUNK + 6, H=20)
    torch.backends.cudnn.rnn.fp32_precision = "tf32"


@pytest.mark.gpu
@pytest.mark.parametrize("options", [(), *SINGLE, EVERYTHING], ids="-".join)
def test_with_a_projection_on_a_gpu(options: Options) -> None:
    torch.backends.cudnn.rnn.fp32_precision = "ieee"
    for _ in range(2):
        in_triton("lstm", options, "cuda", T=2 * cuda_graphs.CHUNK + 6, H=20, proj=7)
    torch.backends.cudnn.rnn.fp32_precision = "tf32"


@pytest.mark.gpu
@pytest.mark.parametrize("proj", [0, 3])
@pytest.mark.parametrize("options", [*SINGLE, EVERYTHING], ids="-".join)
def test_no_waiting_for_a_gpu(options: Options, proj: int) -> None:
    """Neither loop asks the device for anything."""
    for dtype in (torch.float32, torch.float64):
        inputs = make("lstm", options, T=cuda_graphs.CHUNK + 2, proj=proj).to(dtype).on("cuda")
        support.values_and_gradients(support.RECURRENCES["lstm"], inputs, "step")
        torch.cuda.set_sync_debug_mode("error")
        try:
            support.run(support.RECURRENCES["lstm"], inputs, "step")[0].sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def sixteen_bits(name: str, options: Options, dtype: torch.dtype, proj: int = 0) -> None:
    """At most twice the error of plain PyTorch in the same dtype, plus a small floor."""
    recurrence = support.RECURRENCES[name]
    inputs = make(name, options, H=8, proj=proj).to(dtype)
    truth = support.values_and_gradients(recurrence, inputs.to(torch.float64), "reference")
    with pytest.MonkeyPatch.context() as patch:  # plain PyTorch: no operation is in more bits than the layer
        patch.setattr(reference, "state_dtype", lambda dtype: dtype)
        plain = support.values_and_gradients(recurrence, inputs, "reference")
    found = support.values_and_gradients(recurrence, inputs, "step")
    for key, exact in truth.items():
        if not exact.numel():
            continue
        allowed = 2 * (plain[key].double() - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max()
        assert (found[key].double() - exact).abs().max() <= allowed, key


LOW = list(product(["lstm", "gru_reset_before"], [*SINGLE, EVERYTHING], [torch.float16, torch.bfloat16]))


@pytest.mark.parametrize(("name", "options", "dtype"), LOW, ids=str)
def test_sixteen_bits(name: str, options: Options, dtype: torch.dtype) -> None:
    sixteen_bits(name, options, dtype)


@pytest.mark.interpreter
@pytest.mark.parametrize(("name", "options", "dtype"), spread(LOW, apart=True), ids=said)
def test_sixteen_bits_interpreted(name: str, options: Options, dtype: torch.dtype) -> None:
    sixteen_bits(name, options, dtype)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [(), *SINGLE, EVERYTHING], ids="-".join)
def test_sixteen_bits_with_a_projection_interpreted(options: Options, dtype: torch.dtype) -> None:
    sixteen_bits("lstm", options, dtype, proj=5)


def nothing_leaks(name: str, options: Options, dtype: torch.dtype, proj: int = 0) -> None:
    """NaN in the projected input of masked steps reaches no value and no gradient."""
    recurrence = support.RECURRENCES[name]
    inputs = make(name, ("mask", *options), proj=proj).to(dtype).detached()
    assert inputs.controls.flags is not None
    problem = passes.problem_of(recurrence.text(), inputs.options("step"), inputs.layer, "training")
    call = inputs.call(recurrence, problem)
    gates = reference.project(inputs.x, inputs.weights, recurrence.program)
    gates = torch.where(bit(inputs.controls.flags, SKIP).unsqueeze(-1), torch.nan, gates)
    saved = step.forward(call, gates, True, inputs.all_states)
    d_inner = torch.ones_like(saved.inner) if inputs.all_states else None
    loop = step.backward(call, saved, torch.ones_like(saved.y), [torch.ones_like(f) for f in saved.final], d_inner)
    d_x, d_weights = linear.gradients(call, inputs.x, saved, loop)
    found = [saved.y, *saved.final, saved.inner, loop.d_gates, d_x, *d_weights, *loop.d_states, *loop.d_resets]
    assert not [k for k, value in enumerate(found) if value is not None and value.isnan().any()]


@pytest.mark.parametrize("options", LEAKING, ids="-".join)
@pytest.mark.parametrize("name", CELLS)
def test_padding_does_not_leak(name: str, options: Options) -> None:
    nothing_leaks(name, options, torch.float64)


@pytest.mark.interpreter
@pytest.mark.parametrize("options", LEAKING, ids="-".join)
@pytest.mark.parametrize("name", ["lstm", "gru_reset_before"])
def test_padding_does_not_leak_interpreted(name: str, options: Options) -> None:
    nothing_leaks(name, options, torch.float32)


@pytest.mark.interpreter
@pytest.mark.parametrize("options", LEAKING, ids="-".join)
def test_padding_does_not_leak_through_a_projection_interpreted(options: Options) -> None:
    nothing_leaks("lstm", options, torch.float32, proj=3)


@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["gru", "gru_reset_before", "minimal"])
def test_a_projected_h_that_a_step_reads_goes_to_torch(name: str) -> None:
    """Only one that enters nothing but the product may be as wide as it likes."""
    inputs, recurrence = make(name, (), proj=4, H=4), support.RECURRENCES[name]
    expected = support.values_and_gradients(recurrence, inputs, "reference")
    narrow = inputs.to(torch.float32)
    assert not gpu.takes(narrow.x, narrow.call(recurrence))
    support.assert_same(
        {name: value.double() for name, value in support.values_and_gradients(recurrence, narrow, "step").items()},
        expected,
        TIGHT,
    )


@pytest.mark.parametrize("name", ["lstm", "gru_reset_before"])
def test_reset_values_of_one_step_beside_those_of_all(name: str) -> None:
    """Each state's reset values may be of every step or the same for all."""
    inputs, recurrence = make(name, ("reset_values_per_step",)), support.RECURRENCES[name]
    last = inputs.reset_values[-1][:1].detach().requires_grad_()
    inputs = inputs._replace(reset_values=[*inputs.reset_values[:-1], last])
    expected = support.values_and_gradients(recurrence, inputs, "reference")
    support.assert_same(support.values_and_gradients(recurrence, inputs, "step"), expected, EXACT)


@pytest.mark.parametrize("options", SINGLE, ids="-".join)
def test_the_options_drawn_here_change_something(options: Options) -> None:
    """A loop that ignores one is found out."""
    recurrence = support.RECURRENCES["lstm"]
    outputs = support.run(recurrence, make("lstm", options), "reference")
    without = support.run(recurrence, make("lstm", ()), "reference")
    assert len(outputs) > len(without) or any((a - b).abs().max() > 0.01 for a, b in zip(outputs, without, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", CELLS)
def test_nothing_is_refused_but_complex_numbers(name: str, dtype: torch.dtype) -> None:
    """No option runs on the reference."""
    recurrence = support.RECURRENCES[name]
    every = {"flags": True, "reset_values": True, "zone": True, "all_states": True, "norm": True, "lengths": True}
    sizes = {"T": 5, "B": 3, "N": 2, "I": 4, "H": 8, "proj_size": 4, "drop": len(recurrence.gates)}
    on_a_gpu = {"device_type": "cuda", "device": devices.describe("H100"), **sizes, **every}
    assert not step.unsupported(Problem(recurrence=recurrence, dtype=dtype, **on_a_gpu))  # type: ignore[arg-type]
    assert step.unsupported(Problem(recurrence=recurrence, dtype=torch.complex64, **on_a_gpu))  # type: ignore[arg-type]
