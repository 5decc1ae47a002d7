# SPDX-License-Identifier: Apache-2.0
"""Initial values have the distributions that Keras and torch.nn.init define, in the place they are asked for."""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import gpu_rnn
from gpu_rnn import initializers
from gpu_rnn.initializers import INITIALIZERS, apply, fill_, resolve
from tests.support.paths import TESTS
from tests.support.waiting import PATIENCE

GATES, HIDDEN, INPUT = 4, 48, 30
FAN_IN, FAN_OUT = INPUT, GATES * HIDDEN  # of Keras's kernel (I, G * H), as a whole
UNLIKELY = 1e-4  # a right distribution fails a Kolmogorov-Smirnov test this often; the seeds are fixed


def uniform(limit: float) -> Any:
    return stats.uniform(-limit, 2 * limit)


def cut(variance: float) -> Any:
    """Keras's truncated normal: the normal is so much wider that after the cut at two of its deviations this is
    left."""
    std = math.sqrt(variance) / 0.87962566103423978
    return stats.truncnorm(-2, 2, scale=std)


# keras.initializers: VarianceScaling(scale, mode, distribution) and the random initializers at their defaults;
# torch.nn.init: xavier_normal_, kaiming_normal_.
DISTRIBUTIONS = {
    "uniform": uniform(0.05),
    "random_uniform": uniform(0.05),
    "normal": stats.norm(scale=0.05),
    "random_normal": stats.norm(scale=0.05),
    "truncated_normal": stats.truncnorm(-2, 2, scale=0.05),
    "glorot_uniform": uniform(math.sqrt(6 / (FAN_IN + FAN_OUT))),
    "xavier_uniform": uniform(math.sqrt(6 / (FAN_IN + FAN_OUT))),
    "he_uniform": uniform(math.sqrt(6 / FAN_IN)),
    "kaiming_uniform": uniform(math.sqrt(6 / FAN_IN)),
    "lecun_uniform": uniform(math.sqrt(3 / FAN_IN)),
    "glorot_normal": cut(2 / (FAN_IN + FAN_OUT)),
    "he_normal": cut(2 / FAN_IN),
    "lecun_normal": cut(1 / FAN_IN),
    "xavier_normal": stats.norm(scale=math.sqrt(2 / (FAN_IN + FAN_OUT))),
    "kaiming_normal": stats.norm(scale=math.sqrt(2 / FAN_IN)),
}
IN_KERAS = [name for name in INITIALIZERS if not name.startswith(("xavier", "kaiming"))]


def filled(initializer: str | Callable[[Tensor], object], *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    torch.manual_seed(0)
    weight = torch.full(shape or (FAN_OUT, FAN_IN), torch.nan, dtype=dtype)
    fill_(weight, initializer)
    return weight


def test_every_name_is_tested() -> None:
    assert set(INITIALIZERS) == {*DISTRIBUTIONS, "zeros", "ones", "orthogonal"}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_random_values_have_the_distribution_of_the_formula(name: str) -> None:
    values, distribution = filled(name).flatten().numpy(), DISTRIBUTIONS[name]
    assert stats.kstest(values, distribution.cdf).pvalue > UNLIKELY
    low, high = distribution.support()
    assert low <= values.min() and values.max() <= high


def test_width_of_a_cut_normal() -> None:
    assert initializers.CUT_STD == pytest.approx(stats.truncnorm(-2, 2).std(), rel=1e-12)


@pytest.mark.parametrize("name", IN_KERAS)
def test_keras_draws_from_the_same_distribution(name: str) -> None:
    if importlib.util.find_spec("keras") is None:
        pytest.skip("Keras is not installed")
    from tests.support.keras_layers import keras

    keras.utils.set_random_seed(1)
    theirs = keras.initializers.get(name)((FAN_IN, FAN_OUT)).flatten().cpu().numpy()
    ours = filled(name).flatten().numpy()
    # The entries of an orthogonal matrix depend on each other, which makes the two samples more alike, not less.
    assert stats.ks_2samp(ours, theirs).pvalue > UNLIKELY


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(FAN_OUT, HIDDEN), (HIDDEN, HIDDEN), (8, 20)], ids=str)
def test_orthogonal_is_the_whole_matrix(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = filled("orthogonal", *shape, dtype=dtype).double()
    product = weight.T @ weight if shape[0] >= shape[1] else weight @ weight.T
    identity = torch.eye(min(shape), dtype=torch.float64)
    torch.testing.assert_close(product, identity, rtol=0, atol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("name", initializers.FOR_BIASES)
def test_what_needs_no_fans_fills_a_bias(name: str) -> None:
    assert filled(name, FAN_OUT).isfinite().all()


@pytest.mark.parametrize("name", [name for name in INITIALIZERS if name not in initializers.FOR_BIASES])
def test_what_needs_fans_refuses_a_bias(name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' needs a matrix.*zeros, ones"):
        filled(name, FAN_OUT)


def test_a_function_is_used_as_it_is() -> None:
    assert resolve(nn.init.eye_) is nn.init.eye_
    torch.testing.assert_close(filled(nn.init.eye_, 5, 5), torch.eye(5))


def test_a_function_may_split_the_gates() -> None:
    weight = filled(lambda w: [nn.init.orthogonal_(gate) for gate in w.chunk(GATES)], GATES * 5, 5)
    for gate in weight.chunk(GATES):
        torch.testing.assert_close(gate @ gate.T, torch.eye(5))


def test_a_parameter_stays_a_leaf() -> None:
    parameter = nn.Parameter(torch.empty(6, 3))
    fill_(parameter, lambda w: w.fill_(2))
    assert parameter.is_leaf and parameter.requires_grad and (parameter == 2).all()


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ("glorot", ValueError, "unknown initializer 'glorot'; use one of zeros, .*orthogonal, or a function"),
        (3, TypeError, "a name or a function such as torch.nn.init.orthogonal_, not int"),
        (torch.ones_like, TypeError, "fills the tensor it is given"),
    ],
)
def test_what_is_no_initializer_is_refused(wrong: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        filled(wrong)


RECURRENCES = {
    "rnn": (gpu_rnn.cells.rnn(), False),
    "lstm": (gpu_rnn.cells.lstm(peephole=True), False),
    "gru": (gpu_rnn.cells.gru(), True),  # Keras: bias (2, 3H)
    "gru_reset_before": (gpu_rnn.cells.gru(reset_after=False), False),  # Keras: bias (3H)
}


def parameters(recurrence: gpu_rnn.Recurrence, **options: Any) -> dict[str, Tensor]:
    layer = gpu_rnn.Recurrent(recurrence, INPUT, HIDDEN, num_layers=2, bidirectional=True, **options)
    return {name: tensor.detach() for name, tensor in layer.named_parameters()}


@pytest.mark.parametrize("name", RECURRENCES)
def test_each_initializer_reaches_its_weights_of_every_layer(name: str) -> None:
    recurrence, two_biases = RECURRENCES[name]
    given = parameters(recurrence)
    before = {key: tensor.clone() for key, tensor in given.items()}
    apply(given.items(), recurrence, kernel="ones", recurrent="orthogonal", bias=lambda b: b.fill_(3))
    for key, tensor in given.items():
        match key.split("_l")[0]:
            case "weight_ih":
                assert (tensor == 1).all()
            case "weight_hh":
                torch.testing.assert_close(tensor.T @ tensor, torch.eye(HIDDEN), rtol=0, atol=1e-5)
            case "bias_ih":
                assert (tensor == 3).all()
            case "bias_hh":
                assert (tensor == (3 if two_biases else 0)).all()
            case _:
                assert torch.equal(tensor, before[key])


def test_what_is_not_given_keeps_its_values() -> None:
    recurrence = gpu_rnn.cells.lstm()
    given = parameters(recurrence)
    before = {key: tensor.clone() for key, tensor in given.items()}
    apply(given.items(), recurrence)
    assert all(torch.equal(tensor, before[key]) for key, tensor in given.items())


@pytest.mark.parametrize("bias", [None, "zeros", "random_normal"])
@pytest.mark.parametrize("recurrence", [gpu_rnn.cells.lstm(), gpu_rnn.cells.coupled_lstm()], ids=lambda r: r.name)
def test_unit_forget_bias_is_one_in_the_sum_of_the_biases(recurrence: gpu_rnn.Recurrence, bias: str | None) -> None:
    given = parameters(recurrence)
    apply(given.items(), recurrence, bias=bias, unit_forget_bias=True)
    for suffix in ("_l0", "_l1", "_l0_reverse", "_l1_reverse"):
        total = (given[f"bias_ih{suffix}"] + given[f"bias_hh{suffix}"]).view(-1, HIDDEN)
        for gate, values in zip(recurrence.gates, total, strict=True):
            assert (values == 1).all() == (gate == "f")
            assert (values == 0).all() == (bias == "zeros" and gate != "f")


def test_cells_take_them_too() -> None:
    cell = gpu_rnn.LSTMCell(3, 5)
    apply(cell.named_parameters(), cell.recurrence, kernel="zeros", bias="zeros", unit_forget_bias=True)
    h, c = cell(torch.zeros(2, 3), (torch.zeros(2, 5), torch.ones(2, 5)))
    torch.testing.assert_close(c, torch.sigmoid(torch.ones(2, 5)))  # only the forget gate's bias is not 0
    assert h.requires_grad


def test_unit_forget_bias_without_a_forget_gate_is_refused() -> None:
    recurrence = gpu_rnn.cells.gru()
    with pytest.raises(ValueError, match="needs a forget gate f; gru has r, z, n"):
        apply(parameters(recurrence).items(), recurrence, unit_forget_bias=True)


def test_without_biases_there_is_nothing_to_set() -> None:
    recurrence = gpu_rnn.cells.lstm()
    apply(parameters(recurrence, bias=False).items(), recurrence, bias="zeros", unit_forget_bias=True)


def test_values_repeat_with_the_seed() -> None:
    assert torch.equal(filled("glorot_normal"), filled("glorot_normal"))


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Tensor], None]]:
    """torch.nn.init as transformers has it while it loads: its functions leave what is marked as it is. Returns the
    mark."""
    kept: set[int] = set()

    def guard(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def own(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return tensor if id(tensor) in kept else function(tensor, *args, **kwargs)

        return own

    for name in [name for name in vars(nn.init) if name.endswith("_") and not name.startswith("_")]:
        monkeypatch.setattr(nn.init, name, guard(getattr(nn.init, name)))
    yield lambda tensor: kept.add(id(tensor))


GUARDED: dict[str, dict[str, Any]] = {
    "default": {},
    "norm": {"layer_norm": True},
    "unit_forget_bias": {"unit_forget_bias": True},
    "zeros and 1": {"bias_initializer": "zeros", "unit_forget_bias": True},
    "a function": {"recurrent_initializer": lambda w: [each.fill_(1) for each in w.chunk(GATES)]},
    "torch's, bound before": {
        "kernel_initializer": nn.init.kaiming_normal_,
        "recurrent_initializer": nn.init.orthogonal_,
    },
    "bfloat16": {"recurrent_initializer": "orthogonal", "dtype": torch.bfloat16},
    **{name: {"kernel_initializer": name, "recurrent_initializer": name} for name in INITIALIZERS},
}


@pytest.mark.parametrize("options", GUARDED.values(), ids=GUARDED)
def test_whoever_replaces_the_functions_of_torch_nn_init_is_heeded(options: dict[str, Any], guarded: Any) -> None:
    """What is loaded stays, what is not is initialised, though names and functions were given before."""
    layer = gpu_rnn.LSTM(3, 5, **options)
    loaded = [name for name, _ in layer.named_parameters() if name.startswith(("weight_hh", "bias_ih", "norm_ih"))]
    for name, parameter in layer.named_parameters():
        parameter.detach().fill_(7)
        if name in loaded:
            guarded(parameter)
    layer.reset_parameters()
    for name, parameter in layer.named_parameters():
        assert (parameter == 7).all() == (name in loaded), name


def test_sharded_weights_take_every_initializer(tmp_path: Path) -> None:
    """FSDP2's recipe in two processes: made on "meta", sharded, to_empty, reset_parameters."""
    script = TESTS / "support" / "fsdp_initializers.py"
    command = [sys.executable, str(script)]
    both = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], stderr=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    try:
        for process in both:
            _, errors = process.communicate(timeout=PATIENCE)
            assert process.returncode == 0, errors[-2000:]
    finally:
        for process in both:
            process.kill()
