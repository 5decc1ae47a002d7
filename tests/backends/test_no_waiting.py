# SPDX-License-Identifier: Apache-2.0
"""A call on a GPU never makes the host wait for it: nothing reads a value, and what comes from the host is
page-locked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import gpu_rnn
from gpu_rnn import devices
from gpu_rnn.backends import building
from gpu_rnn.backends.group import launch as group
from gpu_rnn.backends.group import nvrtc
from gpu_rnn.backends.step import gpu_buffers
from gpu_rnn.call.controls import StackControls
from gpu_rnn.dispatch import choice
from tests.support.pretend_gpu import OnGPU, Pretend, move, pretend

T, B, H = 6, 3, 16

LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "two layers, both directions": {"num_layers": 2, "bidirectional": True, "dropout": 0.5},
    "wavefront": {"num_layers": 3, "dropout": 0.5},
    "zoneout and recurrent dropout": {"zoneout": 0.1, "recurrent_dropout": 0.1},
    "norm": {"layer_norm": True},
    "batch first": {"batch_first": True},
    "last step": {"return_sequences": False},
}


def calls(batch_first: bool) -> dict[str, dict[str, Any]]:
    """The arguments of calls that steer the steps."""
    shape = (B, T) if batch_first else (T, B)
    flags = OnGPU(torch.rand(shape) < 0.3)
    lengths = torch.tensor([T, 0, 2])
    return {
        "nothing": {},
        "lengths": {"lengths": OnGPU(lengths)},
        "lengths on the host": {"lengths": lengths},
        "a list of lengths": {"lengths": lengths.tolist()},
        "mask": {"mask": flags},
        "mask and lengths": {"mask": flags, "lengths": OnGPU(lengths.int())},
        "resets": {"resets": flags},
    }


@pytest.fixture(autouse=True)
def no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of a GPU, and every backend up to its launches."""
    pretend(monkeypatch)
    monkeypatch.setattr(choice, "device_of", lambda device: devices.describe("H100"))
    for kernel in (building.TritonLaunch, group.Launch):
        monkeypatch.setattr(kernel, "__call__", lambda launch, like: None)
    monkeypatch.setattr(building.Relaunch, "__call__", lambda launch, like, tensors: None)
    for steps in (gpu_buffers.ForwardSteps, gpu_buffers.BackwardSteps):
        monkeypatch.setattr(steps, "run", lambda loop, steps: None)
    monkeypatch.setattr(group, "prepare", lambda problem: None)
    monkeypatch.setattr(group, "error_word", lambda device: torch.zeros(1, dtype=torch.int64))
    monkeypatch.setattr(nvrtc, "unavailable", lambda: "")


BACKENDS = ("step", "resident", "group", "reference")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LAYERS)
def test_a_call(name: str, backend: str) -> None:
    options = LAYERS[name]
    if "layer_norm" in options and backend in ("resident", "group"):
        pytest.skip("there is no layer normalisation on this backend")
    layer = move(gpu_rnn.GRU(4, H, backend=backend, **options))
    x = torch.randn(B, T, 4) if "batch_first" in options else torch.randn(T, B, 4)
    with Pretend() as gpu:
        for kind, given in calls("batch_first" in options).items():
            y, *_ = layer(OnGPU(x), **given)
            y.sum().backward()
            assert y.device.type == "cuda"
            assert not gpu.waits, kind


def test_a_projection() -> None:
    """On `group`, whose launches products surround, in both directions and with values to reset to."""
    layer, x = move(gpu_rnn.LSTM(4, H, proj_size=5, bidirectional=True, backend="group")), torch.randn(T, B, 4)
    values = tuple(OnGPU(torch.randn(T, 2, B, width)) for width in (5, H))
    with Pretend() as gpu:
        for kind, given in (
            calls(False) | {"values": {"resets": OnGPU(torch.rand(T, B) < 0.3), "reset_state": values}}
        ).items():
            y, _ = layer(OnGPU(x), **given)
            y.sum().backward()
            assert not gpu.waits, kind


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", ["step", "reference"])
@pytest.mark.parametrize("enforce_sorted", [True, False])
def test_a_packed_sequence(enforce_sorted: bool, backend: str, dtype: torch.dtype) -> None:
    """Its batch sizes are on the host anyway. In float64 the steps run in torch."""
    layer = gpu_rnn.GRU(4, H, bidirectional=True, backend=backend, dtype=dtype)
    packed = pack_padded_sequence(
        torch.randn(T, B, 4, dtype=dtype), torch.tensor([T, 2, 2]), enforce_sorted=enforce_sorted
    )
    expected = layer(packed)[0].data
    indices = (None if each is None else OnGPU(each) for each in (packed.sorted_indices, packed.unsorted_indices))
    with Pretend() as gpu:
        y, _ = move(layer)(PackedSequence(OnGPU(packed.data), packed.batch_sizes, *indices))
        y.data.sum().backward()
        assert not gpu.waits
    assert y.data.shape == expected.shape
    if dtype == torch.float64:
        torch.testing.assert_close(y.data.held, expected)


@pytest.mark.parametrize("value", ["lengths", "a packed sequence"])
def test_what_is_on_the_host_is_refused_while_a_graph_is_captured(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph would read the host's memory again at each replay, when something else may stand there."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    layer, x = move(gpu_rnn.GRU(4, H, backend="step")), torch.randn(T, B, 4)
    packed = pack_padded_sequence(x, torch.tensor([T, 2, 2]))
    with Pretend(), pytest.raises(RuntimeError, match=r"a CUDA graph cannot read .* from the CPU"):
        if value == "lengths":
            layer(OnGPU(x), lengths=[T, 2, 2])
        else:
            layer(packed._replace(data=OnGPU(packed.data)))


KINDS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64]


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_lengths_of_every_integer_type_are_clamped_as_they_are(dtype: torch.dtype) -> None:
    """Those of a GPU are not looked at but clamped, to more steps than the smaller types can count."""
    x, lengths = torch.zeros(300, 3, 4), torch.tensor([127, 0, 5]).to(dtype)
    with Pretend():
        given = StackControls.of(OnGPU(x), lengths=OnGPU(lengths)).checked(300, [(1, 3, 8)], 3, OnGPU(x)).lengths
    assert given is not None
    assert given.held.tolist() == [127, 0, 5]


@pytest.mark.parametrize("ask", [
    lambda t: t[0].item(), lambda t: bool((t > 0).any()), lambda t: t[t > 0], lambda t: torch.where(t > 0),
    lambda t: torch.ones(3).to(t.device), lambda t: t.masked_select(t > 0), lambda t: t.copy_(torch.ones(3)),
    lambda t: t.index_put((t > 0,), t.sum()), lambda t: torch.equal(t, t),
    lambda t: torch.ones(3).to(t.device, non_blocking=True),
])  # fmt: skip
def test_what_waits_is_seen(ask: Any) -> None:
    with Pretend() as gpu:
        ask(OnGPU(torch.ones(3)))
    assert gpu.waits


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("name", LAYERS)
def test_a_call_on_a_gpu(name: str, backend: str) -> None:
    options = LAYERS[name]
    if "layer_norm" in options and backend in ("resident", "group"):
        pytest.skip("there is no layer normalisation on this backend")
    layer = gpu_rnn.GRU(4, H, backend=backend, device="cuda", **options)
    x = torch.randn(*((B, T) if "batch_first" in options else (T, B)), 4, device="cuda")
    controls = {
        key: {k: getattr(v, "held", v) for k, v in given.items()}
        for key, given in calls("batch_first" in options).items()
    }
    host = ("lengths on the host", "a list of lengths")
    for kind, given in controls.items():
        given = {k: v.cuda() if isinstance(v, torch.Tensor) and kind not in host else v for k, v in given.items()}
        layer(x, **given)[0].sum().backward()  # compiles, and makes what is kept
        torch.cuda.set_sync_debug_mode("error")
        try:
            layer(x, **given)[0].sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
