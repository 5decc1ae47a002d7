# SPDX-License-Identifier: Apache-2.0
"""Random Keras layers beside Keras's own in float32: other ones at each run, with a seed that is printed.

Under every policy, called eagerly, in a functional model, exported, and stateful over two batches; in training, with
gradients. More of them: ``GPU_RNN_FUZZ_SEED=<any> pytest tests/keras/test_random.py`` without ``-m "not slow"``.
"""

from __future__ import annotations

import importlib.util
import os
import random
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.export import Dim

if importlib.util.find_spec("keras") is None:
    pytest.skip("Keras is not installed: pip install gpu-rnn[keras]", allow_module_level=True)
from tests.support import keras_layers as support
from tests.support.keras_layers import gpu_rnn, keras

pytestmark = [support.quiet, pytest.mark.filterwarnings("ignore:.*is experimental and unstable:UserWarning")]

SEED = int(os.environ["GPU_RNN_FUZZ_SEED"])  # set by conftest.py
CASES = 10  # of a test, so that workers share them
POLICIES = ("float32", "mixed_bfloat16", "mixed_float16")
ACTIVATIONS = ("tanh", "relu", "softsign", "sigmoid", "elu", "leaky_relu", "hard_sigmoid", "gelu")


class Case(NamedTuple):
    """A layer, what it is called with, and how."""

    name: str
    merge: str | None  # of a Bidirectional, or "alone"
    policy: str
    way: str  # eager, model, exported or stateful
    options: dict[str, Any]
    batch: int
    steps: int
    units: int
    masked: bool
    given: bool  # initial states
    training: bool
    seed: int


def draw(number: int) -> Case:
    rng = random.Random(f"{SEED} {number}")
    name = rng.choice(("LSTM", "GRU", "SimpleRNN"))
    way = "exported" if number % 15 == 0 and support.KEEPS_SYMBOLS else rng.choice(("eager", "model", "stateful"))
    merge = rng.choice(("alone", "alone", "concat", "sum", "mul", "ave", None))
    options = {
        "activation": rng.choice(ACTIVATIONS) if rng.random() < 0.5 else "tanh",
        "use_bias": rng.random() < 0.8,
        "return_sequences": rng.random() < 0.6,
        "return_state": rng.random() < 0.5,
        "go_backwards": merge == "alone" and rng.random() < 0.3,
        "zero_output_for_mask": rng.random() < 0.3,
    }
    if name != "SimpleRNN":
        options["recurrent_activation"] = rng.choice(("sigmoid", "sigmoid", "hard_sigmoid", "softsign"))
    if name == "GRU":
        options["reset_after"] = rng.random() < 0.6
    training = way != "exported" and rng.random() < 0.5
    if training and rng.random() < 0.6:
        options |= {"dropout": rng.choice((0.0, 0.4)), "recurrent_dropout": rng.choice((0.0, 0.4)), "seed": 5}
    batch, steps, units = rng.randint(1, 5), rng.randint(2, 9), rng.randint(1, 6)
    masked, given = rng.random() < 0.5, rng.random() < 0.4
    return Case(
        name,
        merge,
        rng.choice(POLICIES),
        way,
        options,
        batch,
        steps,
        units,
        masked,
        given,
        training,
        rng.randrange(10**6),
    )


def made(case: Case, library: Any) -> Any:
    """The layer; Keras's on a path where it has none of the bugs in docs/keras.md."""
    options = case.options | {"stateful": case.way == "stateful"}
    ours = library is gpu_rnn.keras
    if not ours and case.name != "SimpleRNN":
        options["use_cudnn"] = False
    if not ours and not options["return_sequences"]:
        options["zero_output_for_mask"] = False
    layer = getattr(library, case.name)(case.units, dtype=case.policy, **options)
    if case.merge != "alone":
        layer = library.Bidirectional(layer, merge_mode=case.merge, dtype=case.policy)
        for seed, part in enumerate((layer.forward_layer, layer.backward_layer)):
            part.cell.seed_generator = keras.random.SeedGenerator(seed)  # Keras's SimpleRNN loses its own
        if not ours:
            layer.compute_mask = lambda *_: None  # TypeError where it is stateful and returns states
    layer.build((case.batch, case.steps, support.FEATURES))
    for number, variable in enumerate(layer.trainable_variables):
        variable.assign(coarse(*variable.shape, seed=number) / 4)
    return layer


def coarse(*shape: int, seed: int) -> Tensor:
    """Numbers of 8 bits: the same under every policy, so that what differs is arithmetic."""
    return support.draw(*shape, seed=seed).bfloat16().float()


def arguments(case: Case, part: int = 0) -> tuple[Tensor, Tensor | None, list[Tensor] | None]:
    """What a layer is given; a stateful layer's second batch goes on without states."""
    x = coarse(case.batch, case.steps, support.FEATURES, seed=case.seed + part)
    mask = support.draw(case.batch, case.steps, seed=case.seed + 10 + part) > -0.4 if case.masked else None
    count = (1 + (case.name == "LSTM")) * (1 if case.merge == "alone" else 2)
    given = case.given and not part
    states = [coarse(case.batch, case.units, seed=case.seed + 20 + k) for k in range(count)] if given else None
    return x, mask, states


class Program(torch.nn.Module):
    """What torch.export takes: tensors alone."""

    def __init__(self, layer: Any, masked: bool) -> None:
        super().__init__()
        self.layer, self.masked = layer, masked

    def forward(self, x: Tensor, *rest: Tensor) -> Any:
        mask, states = (rest[0], rest[1:]) if self.masked else (None, rest)
        return self.layer(x, mask=mask, initial_state=list(states) or None)


def tensors(case: Case, part: int = 0) -> list[Tensor]:
    """The same in one row."""
    x, mask, states = arguments(case, part)
    return [x, *([] if mask is None else [mask]), *(states or [])]


def by_a_model(case: Case, layer: Any, part: int) -> Any:
    given = tensors(case, part)
    inputs = [keras.Input(t.shape[1:], batch_size=case.batch, dtype=str(t.dtype).removeprefix("torch.")) for t in given]
    mask, states = inputs[1] if case.masked else None, inputs[1 + case.masked :] or None
    model = keras.Model(inputs, layer(inputs[0], mask=mask, initial_state=states))
    return model(given, training=case.training)


def by_a_program(case: Case, layer: Any) -> Any:
    """Exported with other sizes than it is called with."""
    batch, steps = Dim("batch", max=64), Dim("steps", max=64)
    given = tensors(case)
    sequences = 1 + case.masked
    rest = tuple({0: batch} | ({1: steps} if k < sequences else {}) for k in range(1, len(given)))
    examples = tuple(tensors(case._replace(batch=3, steps=6)))
    program = Program(layer, case.masked)
    shapes = ({0: batch, 1: steps}, *([rest] if rest else []))
    return torch.export.export(program, examples, dynamic_shapes=shapes, strict=False).module()(*given)


def called(case: Case, layer: Any, part: int) -> Any:
    x, mask, states = arguments(case, part)
    return layer(x, mask=mask, initial_state=states, training=case.training)


def outcome(case: Case, library: Any) -> list[Tensor]:
    """Outputs, of the second call if the layer is stateful, and the gradients of the weights where it trains."""
    layer = made(case, library)
    ways = {"model": lambda: by_a_model(case, layer, 0), "exported": lambda: by_a_program(case, layer)}
    if library is gpu_rnn.keras and case.way in ways:
        outputs = support.flat(ways[case.way]())
    else:
        outputs = [support.flat(called(case, layer, part)) for part in range(2 if case.way == "stateful" else 1)][-1]
    found = [output.detach().float() for output in outputs]
    if case.training:
        loss = sum((output.float() * coarse(*output.shape, seed=k)).sum() for k, output in enumerate(outputs))
        wanted = [variable.value for variable in layer.trainable_variables]
        gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
        found += [torch.zeros_like(w) if g is None else g.float() for g, w in zip(gradients, wanted, strict=True)]
    return found


def said(case: Case) -> str:
    """What is wrong, or nothing: the bound grows with the values and, in gradients, with what Keras's own rounding
    makes."""
    found, expected = outcome(case, gpu_rnn.keras), outcome(case._replace(policy="float32"), keras.layers)
    if [part.shape for part in found] != [part.shape for part in expected]:
        return f"shapes {[part.shape for part in found]}, Keras's {[part.shape for part in expected]}"
    for place, (a, b) in enumerate(zip(found, expected, strict=True)):
        bound = 2 * support.POLICIES[case.policy] * max(1.0, float(b.abs().max()))
        error = float((a - b).abs().max())
        if not error <= bound and not error <= 4 * rounding(case, place):
            return f"result {place} of {len(found)}: {error:.1e} from Keras's in float32, more than {bound:.1e}"
    return ""


def rounding(case: Case, place: int) -> float:
    """How far Keras's own layer under the policy is from its float32; not a stateful one, which forgets in 16 bits."""
    plain = case._replace(way="eager", training=case.training)
    a, b = (outcome(plain._replace(policy=policy), keras.layers)[place] for policy in (case.policy, "float32"))
    return float((a - b).abs().max())


@pytest.mark.parametrize("chunk", [*range(6), *(pytest.param(chunk, marks=pytest.mark.slow) for chunk in range(6, 60))])
def test_random_layers(chunk: int) -> None:
    for number in range(chunk * CASES, (chunk + 1) * CASES):
        case = draw(number)
        try:
            wrong = said(case)
        except Exception as error:
            error.add_note(f"GPU_RNN_FUZZ_SEED={SEED}, case {number}: {case}")
            raise
        assert not wrong, f"{wrong}\nGPU_RNN_FUZZ_SEED={SEED}, case {number}: {case}"


def test_every_way_and_policy_is_drawn() -> None:
    drawn = [draw(number) for number in range(60)]
    assert {case.policy for case in drawn} == set(POLICIES)
    assert {case.way for case in drawn} == {"eager", "model", "stateful", *(["exported"] * support.KEEPS_SYMBOLS)}


@pytest.mark.parametrize("policy", POLICIES)
def test_a_wrong_weight_is_noticed(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weights_of = gpu_rnn.keras.layers.weights_of
    monkeypatch.setattr(gpu_rnn.keras.layers, "weights_of", lambda layer: [w.flip(0) for w in weights_of(layer)])
    for name in ("LSTM", "GRU", "SimpleRNN"):
        case = Case(name, "alone", policy, "eager", {"return_sequences": True}, 2, 5, 4, False, False, False, 0)
        assert said(case)
