# SPDX-License-Identifier: Apache-2.0
"""The step loop's Triton kernels against the float64 reference, in the interpreter and on a GPU."""

from __future__ import annotations

import pytest
import torch

import gpu_rnn
from gpu_rnn import functional
from gpu_rnn.backends.step import cuda_graphs, gpu
from tests.support import loops as support

TIGHT = 1e-5  # float32 against float64 over a few steps
LAYOUTS = [("0", None), ("01", None), ("01", (4, 0, 2))]
HALF = [torch.float16, torch.bfloat16]

pytestmark = pytest.mark.usefixtures("uninitialised_memory_is_nan")


def compare(name: str, reverse: str, lengths: tuple[int, ...] | None, device: str, **sizes: int) -> None:
    recurrence = support.RECURRENCES[name]
    inputs = support.make(recurrence, reverse=reverse, lengths=lengths, **sizes)  # type: ignore[arg-type]
    truth = support.values_and_gradients(recurrence, inputs, "reference")
    narrow = inputs.to(torch.float32).on(device)
    assert gpu.takes(narrow.x, narrow.call(recurrence))
    found = support.values_and_gradients(recurrence, narrow, "step")
    support.assert_same({k: v.double().cpu() for k, v in found.items()}, truth, TIGHT)


@pytest.mark.interpreter
@pytest.mark.parametrize(("reverse", "lengths"), LAYOUTS)
@pytest.mark.parametrize("name", support.RECURRENCES)
def test_interpreted(name: str, reverse: str, lengths: tuple[int, ...] | None) -> None:
    compare(name, reverse, lengths, "cpu", T=4)


@pytest.mark.gpu
@pytest.mark.parametrize(("reverse", "lengths"), [("0", None), ("01", None), ("01", (70, 0, 33))])
@pytest.mark.parametrize("name", support.RECURRENCES)
def test_on_a_gpu(name: str, reverse: str, lengths: tuple[int, ...] | None) -> None:
    """More steps than two chunks, so that a captured graph is replayed, and steps left over."""
    torch.backends.cudnn.rnn.fp32_precision = "ieee"
    for _ in range(2):  # the second call replays from its first chunk
        compare(name, reverse, lengths, "cuda", T=2 * cuda_graphs.CHUNK + 6, H=20)
    for steps in () if lengths else (1, 7, 7, cuda_graphs.CHUNK - 1):  # the same graphs, and smaller ones
        compare(name, reverse, None, "cuda", T=steps, H=20)
    torch.backends.cudnn.rnn.fp32_precision = "tf32"


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", ["lstm", "gru", "gru_reset_before", "slstm"])
def test_sixteen_bits(name: str, dtype: torch.dtype) -> None:
    """At most twice the error of plain PyTorch in the same dtype, plus a small floor."""
    recurrence = support.RECURRENCES[name]
    inputs = support.make(recurrence, T=6, H=8).to(dtype)
    truth = support.values_and_gradients(recurrence, inputs.to(torch.float64), "reference")
    plain = support.values_and_gradients(recurrence, inputs, "reference")
    found = support.values_and_gradients(recurrence, inputs, "step")
    for key, exact in truth.items():
        allowed = 2 * (plain[key].double() - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max()
        assert (found[key].double() - exact).abs().max() <= allowed, key


@pytest.mark.interpreter
def test_one_unit_one_sample_one_step() -> None:
    compare("lstm", "0", None, "cpu", T=1, B=1, I=1, H=1)


@pytest.mark.gpu
def test_clear_caches_frees_the_graphs_memory() -> None:
    """The buffers are PyTorch's again, and the next calls, first ones once more, compute the same."""
    layer, x = (
        gpu_rnn.LSTM(4, 64, backend="step", device="cuda"),
        torch.randn(2 * cuda_graphs.CHUNK, 2, 4, device="cuda"),
    )

    def run() -> torch.Tensor:
        with torch.no_grad():
            return layer(x)[0]

    gpu_rnn.clear_caches()
    expected = run()
    for _ in range(2):
        torch.testing.assert_close(run(), expected)
    buffers = torch.cuda.memory_allocated()
    assert any(cuda_graphs.Chunks.kept.values())
    gpu_rnn.clear_caches()
    assert not cuda_graphs.Chunks.kept and torch.cuda.memory_allocated() < buffers
    for _ in range(3):
        torch.testing.assert_close(run(), expected)


@pytest.mark.gpu
def test_inside_a_users_graph() -> None:
    """While the user captures, the loop runs inside of that graph; replays see new input."""
    recurrence = support.RECURRENCES["lstm"]
    weights = [torch.randn(32, 4), torch.randn(32, 8), torch.randn(32), torch.randn(32)]
    weights = [0.3 * w.cuda() for w in weights]
    x = torch.randn(40, 2, 4, device="cuda")

    def run() -> torch.Tensor:
        with torch.no_grad():
            return functional.rnn(x, None, weights, recurrence, backend="step")[0]

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.testing.assert_close(y, run())
