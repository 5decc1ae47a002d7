# SPDX-License-Identifier: Apache-2.0
"""A call while a CUDA graph is captured asks for no kernel that the same call before the capture did not load.

To load one is not allowed while a graph is captured. Triton builds another for a pointer that is no multiple of 16
bytes, and for an integer that is 1 or no multiple of 16: whatever differs between the two calls must not change either.
"""

from typing import Any

import pytest
import torch

import gpu_rnn
from gpu_rnn.backends.group import launch as group
from gpu_rnn.backends.group.layout import Layout
from tests.support import group as support
from tests.support.stub_driver import NEEDS_STUB, run

PROGRAM = """
from gpu_rnn.backends.step import cuda_graphs

whole = cuda_graphs.Chunks.get  # as while a graph is captured: all steps at once, in buffers of the call's own

def chunked(key, make, like):
    size = cuda_graphs.CHUNK
    return whole(key, make, like) if len(like) < size else cuda_graphs.Chunks(make(size), size)

def elsewhere(tensor):
    "The same values, not at a multiple of 16 bytes."
    tensor = tensor.detach()
    return torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape).copy_(tensor)

def call(layer, place, T, B, **given):
    states = tuple(place(torch.randn(layer.num_layers, B, layer.hidden_size)) for _ in layer.recurrence.states)
    y, *_ = layer(place(torch.randn(T, B, 4)), states if len(states) > 1 else states[0], **given)
    y.backward(place(torch.randn(y.shape)))

def loaded(name, T, B, H, given, **options):
    "What the second call loads; how many the first did."
    layer = getattr(gpu_rnn, name)(4, H, **options)
    driver.clear()
    cuda_graphs.Chunks.get = chunked
    call(layer, lambda t: t, T, B, **given(T, B))
    first = len(driver.modules)
    driver.clear()
    cuda_graphs.Chunks.get = whole
    for name, p in layer.named_parameters():
        p.data = elsewhere(p)
    call(layer, elsewhere, T, B, **{key: elsewhere(value) for key, value in given(T, B).items()})
    print(first > 0, driver.modules)
"""

NONE = "lambda T, B: {}"
RESETS = "lambda T, B: dict(resets=torch.rand(T, B) < 0.2)"
LENGTHS = "lambda T, B: dict(lengths=torch.randint(1, T + 1, (B,)))"

STEP = [
    ("LSTM", 33, 1, 5, NONE, ""),
    ("GRU", 35, 3, 6, RESETS, "reset_after=False, zoneout=0.1, recurrent_dropout=0.2"),
    ("GRU", 3, 1, 1, LENGTHS, "layer_norm=True"),
]
RESIDENT = [
    ("LSTM", 1, 1, 16, NONE, ""),
    ("GRU", 5, 3, 7, RESETS, "reset_after=False, recurrent_dropout=0.2, recurrent_dropout_per_gate=True, zoneout=0.1"),
    ("LSTM", 2, 3, 8, LENGTHS, "peephole=True, num_layers=2"),
]


@pytest.mark.compile
@NEEDS_STUB
@pytest.mark.parametrize("backend", ["step", "resident"])
def test_the_variants_are_those_of_the_call_before(backend: str) -> None:
    lines = [
        f"loaded('{name}', {steps}, {batch}, {hidden}, {given}, backend='{backend}'{', ' * bool(options)}{options})"
        for name, steps, batch, hidden, given, options in (STEP if backend == "step" else RESIDENT)
    ]
    assert run("\n".join([PROGRAM, *lines])).splitlines() == ["True []"] * len(lines)


@pytest.mark.compile
@NEEDS_STUB
def test_a_wavefront_asks_for_the_variants_of_the_call_before() -> None:
    """Its launches take parts of the tensors of all layers."""
    found = run(
        PROGRAM
        + """
from gpu_rnn.dispatch import choice, wavefront_plan

choice._plan = lambda problem, loop: choice._Plan(1.0, 2, wavefront_plan.launched(problem, 2, problem.layers))
choice.staggers = lambda problem, backend: True
loaded("LSTM", 7, 3, 5, lambda T, B: {}, num_layers=3, backend="resident")
print(len(driver.launches) > 2 * 3)  # which layer after layer takes
"""
    )
    assert found.splitlines() == ["True []", "True"]


@pytest.mark.compile
@NEEDS_STUB
def test_one_build_of_a_step_serves_every_batch_and_number_of_steps() -> None:
    found = run(
        PROGRAM
        + """
layer = gpu_rnn.LSTM(4, 5, backend="step", zoneout=0.1)
call(layer, lambda t: t, 2, 3)
driver.clear()
for T, B in ((1, 1), (1, 16), (3, 1), (7, 5), (16, 16), (33, 2)):
    call(layer, elsewhere, T, B)
print(driver.modules)
"""
    )
    assert found == "[]"


def elsewhere(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, not at a multiple of 16 bytes."""
    return torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape).copy_(tensor.detach())


@pytest.mark.parametrize("options", [{}, {"zoneout": 0.1, "recurrent_dropout": 0.2}], ids=str)
def test_the_group_kernels_are_those_of_the_call_before(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are told whether pairs of units can be loaded at once."""
    asked: set[Layout] = set()
    support.pretend(monkeypatch)
    monkeypatch.setattr(group.Launch, "__call__", lambda launch, device: asked.add(launch.layout))
    layer = gpu_rnn.LSTM(4, 32, backend="group", **options).half()

    def call(place: Any) -> None:
        states = tuple(place(torch.zeros(1, 3, 32, dtype=torch.half)) for _ in "hc")
        y, _ = layer(torch.zeros(5, 3, 4, dtype=torch.half), states)
        y.backward(place(torch.ones_like(y)))

    call(lambda tensor: tensor)
    before = set(asked)
    assert before
    assert all(layout.paired for layout in before)
    for p in layer.parameters():
        p.data = elsewhere(p)
    call(elsewhere)
    assert asked == before


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["step", "resident", "group", "aten"])
@pytest.mark.parametrize("steps", [7, 33, 70])
def test_a_captured_call_is_right(backend: str, steps: int) -> None:
    """After one call of the same shapes, with other tensors, both passes are captured and replayed on other values."""
    layer = gpu_rnn.LSTM(4, 20, backend=backend, device="cuda", dtype=torch.bfloat16)
    batches = [torch.randn(steps, 3, 4, device="cuda", dtype=torch.bfloat16) for _ in range(3)]

    def both(x: torch.Tensor) -> list[torch.Tensor]:
        y, _ = layer(x)
        return [y, *torch.autograd.grad(y.float().square().sum(), list(layer.parameters()))]

    expected = both(batches[2])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        both(batches[0])
    torch.cuda.current_stream().wait_stream(side)
    graph, given = torch.cuda.CUDAGraph(), batches[1].clone()
    with torch.cuda.graph(graph):
        found = both(given)
    given.copy_(batches[2])
    graph.replay()
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["step", "resident", "group"])
@pytest.mark.parametrize("steps", [7, 70])
def test_torch_compile_with_cuda_graphs(backend: str, steps: int) -> None:
    """Nothing that a call keeps lies in the pool of torch.compile's graphs, which checks for it."""
    import torch._inductor.config as inductor

    layer = gpu_rnn.LSTM(4, 20, backend=backend, device="cuda")
    with inductor.patch({"triton.slow_path_cudagraph_asserts": True}):
        compiled = torch.compile(layer, mode="reduce-overhead")
        for _ in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            x = torch.randn(steps, 3, 4, device="cuda")
            y, _ = compiled(x)
            y.square().sum().backward()
            torch.testing.assert_close(y, layer(x)[0])
