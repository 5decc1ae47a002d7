# SPDX-License-Identifier: Apache-2.0
"""A call while a CUDA graph is captured asks for no kernel that the same call before the capture did not load.

To load one is not allowed while a graph is captured. Triton builds another for a pointer that is no multiple of 16 bytes,
and for an integer that is 1 or no multiple of 16: whatever differs between the two calls must not change either.
"""

import pytest
from stub_driver.process import NEEDS_STUB, run

pytestmark = [pytest.mark.compile, NEEDS_STUB]

PROGRAM = """
from gpu_rnn.launch import graphs

whole = graphs.Chunks.get  # as while a graph is captured: all steps at once, in buffers of the call's own

def chunked(key, make, like):
    return whole(key, make, like) if len(like) < graphs.CHUNK else graphs.Chunks(make(graphs.CHUNK), graphs.CHUNK)

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
    graphs.Chunks.get = chunked
    call(layer, lambda t: t, T, B, **given(T, B))
    first = len(driver.modules)
    driver.clear()
    graphs.Chunks.get = whole
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


@pytest.mark.parametrize("backend", ["step", "resident"])
def test_the_variants_are_those_of_the_call_before(backend: str) -> None:
    lines = [
        f"loaded('{name}', {steps}, {batch}, {hidden}, {given}, backend='{backend}'{', ' * bool(options)}{options})"
        for name, steps, batch, hidden, given, options in (STEP if backend == "step" else RESIDENT)
    ]
    assert run("\n".join([PROGRAM, *lines])).splitlines() == ["True []"] * len(lines)


def test_one_build_of_a_step_serves_every_batch_and_number_of_steps() -> None:
    found = run(PROGRAM + """
layer = gpu_rnn.LSTM(4, 5, backend="step", zoneout=0.1)
call(layer, lambda t: t, 2, 3)
driver.clear()
for T, B in ((1, 1), (1, 16), (3, 1), (7, 5), (16, 16), (33, 2)):
    call(layer, elsewhere, T, B)
print(driver.modules)
""")
    assert found == "[]"
