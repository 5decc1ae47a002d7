# SPDX-License-Identifier: Apache-2.0
"""From a layer's call to a backend: describe the call, choose, and run the whole stack or layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gpu_rnn import environment
from gpu_rnn.backends import aten
from gpu_rnn.call import arguments, autocast, autograd, onlookers, second_order
from gpu_rnn.call.controls import NONE, StackControls
from gpu_rnn.call.stack import Stack, States
from gpu_rnn.dispatch import choice
from gpu_rnn.recurrence import Recurrence


def rnn(
    x: Tensor,
    hx: States | None,
    weights: Sequence[Tensor],
    recurrence: Recurrence,
    *,
    bias: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    batch_sizes: Tensor | None = None,
    proj_size: int = 0,
    backend: str = "auto",
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    reset_state: States | None = None,
    recurrent_mask: Tensor | None = None,
    zone: Tensor | None = None,
    norm: bool = False,
    all_states: bool = False,
) -> tuple[Tensor, States] | tuple[Tensor, States, States]:
    """Runs a stack of recurrent layers.

    Args:
        x: (T, B, I); (B, T, I) with `batch_first`; packed data (sum of batch_sizes, I) with `batch_sizes`.
        hx: one tensor per state of the recurrence, (D·num_layers, B, H); h has proj_size features with a projection.
            None: the recurrence's initial values.
        weights: for each layer and direction in torch's order: w_ih (G·H, I), w_hh (G·H, P), then b_ih and b_hh (G·H)
            with `bias`, w_hr (P, H) with `proj_size`, (params, H) if the recurrence has per-unit parameters, and with
            `norm` the scales (G·H) of the normalised input products and of the normalised recurrent products.
        recurrence: the cell.
        dropout, training: dropout between layers, in training.
        batch_sizes: (T,) int64 on the CPU, as in PackedSequence.
        backend: "auto" or a name from `gpu_rnn.dispatch.BACKENDS`.
        mask: bool, (T, B) or with `batch_first` (B, T): True where a step counts. States carry over the other steps,
            whose outputs are 0; what x holds there, NaN too, reaches nothing.
        lengths: integers (B,), 0 allowed: rows end there, as with pack_padded_sequence, and the reverse direction
            starts there.
        resets: bool, shaped like mask: True where an episode begins. States are set before such a step to
            `reset_state`, and the reverse direction is cut at the same place.
        reset_state: a tensor for each state, (D·num_layers, B, ·) or for each step (T, D·num_layers, B, ·). None: the
            recurrence's initial values.
        recurrent_mask: (D·num_layers, B, 1 or G, P), factors of h where it enters the products, the same at all steps:
            recurrent dropout with one mask for all gates (Gal & Ghahramani, arXiv:1512.05287) or one for each.
        zone: bool, (states, T, D·num_layers, B, H): units that keep their state (Krueger et al., arXiv:1606.01305).
        norm: layer-normalise the products, gate by gate: LN(W_ih x)·g_ih + b_ih and LN(W_hh h)·g_hh + b_hh
            (Ba et al., arXiv:1607.06450).
        all_states: return all states of all steps as well.

    Returns:
        The h of every step, like x with D·P features, and the final states, shaped like hx; with `all_states` also the
        states after every step, (T, D·num_layers, B, ·) each.

    Raises:
        ValueError: a backend that does not exist or cannot run this call, with every reason; a number out of range.
            A mask, lengths, resets or reset_state of another shape, or beside batch_sizes.
        TypeError: an argument of another kind: no tensor where one belongs, a flag that is not a bool, a mask or resets
            that are not bool, lengths that are not integers.
        RuntimeError: no time steps; tensors on different devices or of different dtypes; x, hx or weights of another
            shape.

    Example::

        >>> weights = [torch.randn(32, 3), torch.randn(32, 8), torch.zeros(32), torch.zeros(32)]
        >>> y, (h, c) = functional.rnn(torch.randn(5, 2, 3), None, weights, cells.lstm())
        >>> y.shape, c.shape
        (torch.Size([5, 2, 8]), torch.Size([1, 2, 8]))
    """
    stack = Stack(
        recurrence,
        bias,
        num_layers,
        dropout,
        bidirectional,
        batch_first,
        proj_size,
        backend,
        norm,
        all_states,
    )
    arguments.check(stack, x, hx, weights, batch_sizes)
    arguments.flag("training", training)
    stack = stack if training else stack._replace(dropout=0.0)
    if reset_state is not None:
        arguments.each_tensor("reset_state", reset_state, recurrence.states)
    controls = StackControls.of(x, mask, lengths, resets, reset_state, recurrent_mask, zone)
    if controls.given:
        controls.refuse_packed(batch_sizes)
        controls = controls.transposed() if batch_first else controls
        steps, batch = stack.sizes(x, batch_sizes)
        controls = controls.checked(steps, stack.state_shapes(weights, batch), len(recurrence.gates), x)
    y, states, every = run(stack, x, hx, weights, batch_sizes, controls)
    return (y, states, every) if all_states else (y, states)


def run(
    stack: Stack,
    x: Tensor,
    hx: States | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    controls: StackControls = NONE,
) -> tuple[Tensor, States, States]:
    """`rnn` with the arguments that do not change between a layer's calls in one; always with all states, if only ().

    The controls are checked already.
    """
    if torch._C._is_any_autocast_enabled():
        (x,), hx, weights = autocast.cast((x,)), hx and autocast.cast(hx), autocast.cast(weights)
        arguments.check_alike(x, weights, ())
        if autocast.on(x):
            with autocast.off(x):
                return run(stack, x, hx, weights, batch_sizes, controls)
    steps, batch = stack.sizes(x, batch_sizes)
    if not onlookers.recorded(x):
        if x.is_cpu and _certainly_aten(stack, x, controls):
            return *stack.aten(x, hx or stack.initial(x, weights, batch), weights, batch_sizes), ()
        problem = stack.problem(x, hx, weights, steps, batch, batch_sizes is not None, controls)
        if choice.select(problem, stack.backend) == "aten":
            states = hx or stack.initial(x, weights, batch)
            if x.is_cuda:
                return *_aten_on_gpu(stack, x, states, weights, batch_sizes, problem.training), ()
            return *stack.aten(x, states, weights, batch_sizes), ()
    elif _recorded_as_aten(stack.backend) and _takes_aten(stack, x, controls):
        return *stack.aten(x, hx or stack.initial(x, weights, batch), weights, batch_sizes, recorded=True), ()
    return stack.loops(x, hx or stack.initial(x, weights, batch), weights, batch_sizes, controls)


def _certainly_aten(stack: Stack, x: Tensor, controls: StackControls) -> bool:
    """On a CPU ATen is predicted cheapest wherever it runs: no Problem is needed, which takes 5 µs of a short call to
    make."""
    return choice.only_predicted_on_cpu() and _takes_aten(stack, x, controls)


def _takes_aten(stack: Stack, x: Tensor, controls: StackControls) -> bool:
    """Whether ATen has a stack's cell and options, and nothing forbids it."""
    return (
        stack.recurrence.aten is not None
        and not (stack.norm or stack.all_states or (controls is not NONE and controls.given))
        and stack.backend in ("auto", "aten")
        and not environment.names_a_backend()
        and not autograd.transforms_active()
        and not x.is_complex()
        and not aten.missing(stack.recurrence.aten, x.dtype, torch.is_grad_enabled())
    )


def _recorded_as_aten(backend: str) -> bool:
    """What records sees ATen's operations as well as this package's. A trace is of ATen's, as torch.nn's is, where it
    can
    be: it then runs without this package."""
    return not torch.compiler.is_compiling() and (backend == "aten" or onlookers.traced())


def _aten_on_gpu(
    stack: Stack, x: Tensor, states: States, weights: Sequence[Tensor], batch_sizes: Tensor | None, training: bool
) -> tuple[Tensor, States]:
    """With dropout each layer is a call, and torch's dropout between them: torch.manual_seed makes it repeat, and
    second derivatives meet the same masks, neither of which holds for cuDNN's own."""
    if stack.dropout and stack.num_layers > 1:
        return stack.one_by_one(_aten_on_gpu, x, states, weights, batch_sizes, training)
    run = _with_second_order if training else Stack.aten
    return run(stack._replace(dropout=0.0), x, states, weights, batch_sizes)


def _with_second_order(
    stack: Stack, x: Tensor, states: States, weights: Sequence[Tensor], batch_sizes: Tensor | None
) -> tuple[Tensor, States]:
    """ATen's kernels on a GPU, whose backward pass cannot be differentiated, with the loops for that."""
    count = 1 + len(states)

    def fast(*tensors: Tensor) -> tuple[Tensor, ...]:
        y, final = stack.aten(tensors[0], tensors[1:count], tensors[count:], batch_sizes)
        return (y, *final)

    def exact(*tensors: Tensor) -> tuple[Tensor, ...]:
        loops = stack._replace(backend="auto")
        y, final, _ = loops.loops(tensors[0], tensors[1:count], tensors[count:], batch_sizes)
        return (y, *final)

    y, *final = second_order.differentiable(fast, exact, (x, *states, *weights))
    return y, tuple(final)


def cell(
    x: Tensor,
    hx: States | None,
    weights: Sequence[Tensor],
    recurrence: Recurrence,
    *,
    bias: bool = True,
    backend: str = "auto",
) -> States:
    """One step: x (B, I) and states (B, H) -> new states (B, H). Arguments and errors as `rnn`'s."""
    arguments.check_cell(Stack(recurrence, bias, backend=backend), x, hx, weights)
    return one_step(x, hx, weights, recurrence, bias, backend)


def one_step(
    x: Tensor, hx: States | None, weights: Sequence[Tensor], recurrence: Recurrence, bias: bool, backend: str
) -> States:
    """`cell` of arguments that are checked already."""
    if torch._C._is_any_autocast_enabled():
        (x,), hx = autocast.cast((x,)), hx and autocast.cast(hx)
    if recurrence.aten and backend in ("auto", "aten") and (not onlookers.recorded(x) or _recorded_as_aten(backend)):
        if not autograd.transforms_active():
            given = hx or tuple(s[0] for s in Stack(recurrence, bias).initial(x[None], weights, x.shape[0]))
            biases = weights[2:] if bias else (None, None)
            # Under autocast torch's own rule casts the weights: it keeps them for the next step of a loop.
            found = aten.CELLS[recurrence.aten](x, given if len(given) > 1 else given[0], *weights[:2], *biases)
            return tuple(found) if len(given) > 1 else (found,)
    states = None if hx is None else tuple(state[None] for state in hx)
    _, final, _ = run(Stack(recurrence, bias, backend=backend), x[None], states, weights, None)
    return tuple(state[0].clone() for state in final)  # no views: those cannot be detached in place
