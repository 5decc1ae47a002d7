# SPDX-License-Identifier: Apache-2.0
"""One call: describe it, choose, and run the whole stack in ATen's kernels or layer by layer on the loops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_rnn import environment, memo
from gpu_rnn.backends import AGAIN, aten
from gpu_rnn.backends.native import limits
from gpu_rnn.backends.problem import Problem
from gpu_rnn.call import arguments, autocast, direct, loops, onlookers, plans, second_order, single_step, transforms
from gpu_rnn.call.controls import NONE, StackControls
from gpu_rnn.call.stack import Stack, States
from gpu_rnn.dispatch import choice, relaxation_plan


def sequence(
    stack: Stack,
    x: Tensor,
    hx: States | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    controls: StackControls = NONE,
    alike: bool = False,
) -> tuple[Tensor, States, States]:
    """`functional.rnn` with the arguments that do not change between a layer's calls in one; always with all states,
    if only ().

    The controls are checked already; `alike`: so it is that all tensors are on one device and of one dtype.
    """
    autocasts = torch._C._is_any_autocast_enabled()
    if autocasts:
        (x,), hx, weights = autocast.cast((x,)), hx and autocast.cast(hx), autocast.cast(weights)
        arguments.check_alike(x, weights, ())
    if autocasts and autocast.on(x):
        with autocast.off(x):
            return sequence(stack, x, hx, weights, batch_sizes, controls, alike)
    recorded = onlookers.recorded(x)
    if (recorded or torch._C._are_functorch_transforms_active()) and transforms.leaves_graph():
        return transforms.outside_of_graphs(sequence, stack, x, hx, weights, batch_sizes, controls, alike)
    if stack.time_parallel and recorded and stack.backend == "aten":  # whose kernels take all steps
        stack = replace(stack, time_parallel=0.0)
    if recorded and stack.backend == "aten" and onlookers.writes_onnx():
        stack = replace(stack, backend="auto")  # a file has layers, and whoever reads it the kernels
    elif recorded and _recorded_whole(stack, x, controls):
        return *_whole(stack, x, hx, weights, batch_sizes), ()
    steps, batch = stack.sizes(x, batch_sizes)
    if stack.time_parallel and not recorded:
        problem = stack.problem(x, hx, weights, batch_sizes, controls)
        if not relaxation_plan.against(problem, stack.backend, stack.time_parallel):
            return _on_loops(stack, x, hx, weights, batch_sizes, controls, alike)
        stack = replace(stack, time_parallel=0.0)
    if not recorded:
        if x.is_cpu:
            if choice.only_predicted_on_cpu() and _takes_aten(stack, x, controls):
                wanting = torch.is_grad_enabled() and _any_wants_grad((x, *weights, *(hx or ())))
                sizes = x.shape if batch_sizes is None else (x.shape, steps, batch)
                kind = stack.as_key, sizes, weights[0].shape[0], x.dtype, wanting, torch.get_num_threads()
                name = _predictions.get(kind) or _predicted(kind, stack.problem(x, hx, weights, batch_sizes), stack)
                if name == "aten":
                    return *_aten(stack, x, hx or stack.initial(x, weights, batch), weights, batch_sizes), ()
        short = _on_a_cpu if x.is_cpu else _on_a_gpu
        if (found := short(stack, x, hx, weights, batch_sizes, controls, steps, batch)) is not None:
            return found
        plain = batch_sizes is None and controls is NONE and not autocasts
        if plain and stack.plans and (planned := plans.run(stack, x, hx, weights)) is not None:
            return planned
        problem = stack.problem(x, hx, weights, batch_sizes, controls)
        chosen = choice.select(problem, stack.backend)
        if chosen == "aten":
            states = hx or stack.initial(x, weights, batch)
            if x.is_cuda:
                return *_aten_on_gpu(stack, x, states, weights, batch_sizes, problem.training), ()
            return *_aten(stack, x, states, weights, batch_sizes), ()
        if plain and chosen in AGAIN and not problem.training:
            plans.learn(stack, x, hx or stack.initial(x, weights, batch), weights)
    elif _recorded_as_aten(stack.backend) and _takes_aten(stack, x, controls):
        return *_aten(stack, x, hx or stack.initial(x, weights, batch), weights, batch_sizes, recorded=True), ()
    return _on_loops(stack, x, hx, weights, batch_sizes, controls, alike)


def _on_loops(
    stack: Stack,
    x: Tensor,
    hx: States | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    controls: StackControls,
    alike: bool,
) -> tuple[Tensor, States, States]:
    if not alike:
        arguments.check_alike(x, weights, hx or ())
    states, zeros = hx or stack.initial(x, weights, stack.sizes(x, batch_sizes)[1]), hx is None and stack.starts_at_zero
    return loops.run(stack, x, states, weights, batch_sizes, controls, zeros)


def _on_a_cpu(
    stack: Stack,
    x: Tensor,
    hx: States | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    controls: StackControls,
    steps: int,
    batch: int,
) -> tuple[Tensor, States, States] | None:
    """The ways of a CPU that ask for little; None where a call takes none of them."""
    plain = batch_sizes is None and not controls.given
    if steps == 1 and plain and stack.is_one_layer and batch <= limits.MOST_ROWS and not transforms.active():
        found = _one_step_of_a_layer(stack, x, hx or stack.initial(x, weights, batch), weights)
        if found is not None:
            return found
    if batch_sizes is None:
        return direct.run(stack, x, hx, weights, controls)
    if steps * batch == len(x):  # packed, and all rows of one length
        stack, x = stack.time_first, x.reshape(steps, batch, -1)
        found = _on_a_cpu(stack, x, hx, weights, None, controls, steps, batch)
        return None if found is None else (found[0].flatten(0, 1), *found[1:])
    return None


def _on_a_gpu(
    stack: Stack,
    x: Tensor,
    hx: States | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    controls: StackControls,
    steps: int,
    batch: int,
) -> tuple[Tensor, States, States] | None:
    """Likewise in training of other devices; those in inference have plans (`plans`)."""
    asks = batch_sizes is None and torch.is_grad_enabled()
    return direct.run(stack, x, hx, weights, controls) if asks else None


def _one_step_of_a_layer(
    stack: Stack, x: Tensor, states: States, weights: Sequence[Tensor]
) -> tuple[Tensor, States, States] | None:
    final = single_step.run(stack, x.transpose(0, 1) if stack.batch_first else x, states, weights)
    if final is None:
        return None
    y = final[0].clone()  # of its own: who changes one of both changes not the other
    return y.transpose(0, 1) if stack.batch_first else y, final, ()


MOST_PREDICTIONS = 4096  # of calls whose backend is kept

_predictions: dict[tuple[object, ...], str] = memo.hold(f"{__name__}: predictions", {}, MOST_PREDICTIONS)


def _predicted(kind: tuple[object, ...], problem: Problem, stack: Stack) -> str:
    """The backend that is predicted the fastest on a CPU for a call without controls. A Problem, which takes 5 µs of a
    short call to make, is made for the first of those that are alike."""
    return memo.put(_predictions, kind, choice.select(problem, stack.backend), MOST_PREDICTIONS)


def _any_wants_grad(tensors: Sequence[Tensor]) -> bool:
    return any(tensor.requires_grad for tensor in tensors)


def _takes_aten(stack: Stack, x: Tensor, controls: StackControls) -> bool:
    """Whether ATen has what a call on a CPU wants, and nothing but predictions says whether it runs there. The words of
    a refusal are `aten.unsupported`'s."""
    mode = stack.recurrence.aten
    return (
        mode is not None
        and stack.is_atens
        and (controls is NONE or not controls.given)
        and (stack.backend == "aten" or not environment.names_a_backend())
        and not transforms.active()
        and not x.is_complex()
        and not aten.missing(mode, x.dtype, torch.is_grad_enabled())
    )


def _recorded_as_aten(backend: str) -> bool:
    """What records sees ATen's operations as well as this package's. A trace is of ATen's, as torch.nn's is, where it
    can be: it then runs without this package."""
    return not torch.compiler.is_compiling() and (backend == "aten" or onlookers.traced())


def _recorded_in_parts(stack: Stack) -> bool:
    """Whether torch.compile records a cell as plain operations (`gpu_rnn.call.cell_op`). An exported program has it
    whole: an ONNX graph takes it for one node."""
    compiles = torch.compiler.is_compiling() and not torch.compiler._is_exporting_flag
    return compiles and stack.backend in ("auto", "reference")


def _recorded_whole(stack: Stack, x: Tensor, controls: StackControls) -> bool:
    """Whether torch.compile records the whole stack as one operation (`gpu_rnn.call.stack_ops`), which runs as an eager
    call does: plain calls on a CPU, and those that only ATen shall run.

    An exported program has each layer by itself, and ATen's alone as one: its backend is chosen where it runs.
    """
    if not torch.compiler.is_compiling() or stack.all_states or stack.time_parallel:
        return False
    if controls is not NONE and controls.given:  # Dynamo would guard each field of NONE at every call
        return False
    if (stack.dropout and stack.num_layers > 1) or x.is_complex():
        return False
    return stack.backend == "aten" or (x.is_cpu and not torch.compiler._is_exporting_flag)


def _whole(
    stack: Stack, x: Tensor, hx: States | None, weights: Sequence[Tensor], batch_sizes: Tensor | None
) -> tuple[Tensor, States]:
    """The stack by one operation, time first."""
    onlookers.refuse_tangents()
    if batch_sizes is not None and hx is None:
        hx = stack.initial(x, weights, int(batch_sizes[0]))
    elif batch_sizes is None:
        stack.sizes(x, None)  # it raises where there are no steps
    wanted = ""
    if torch.is_grad_enabled() and not torch.compiler._is_exporting_flag:
        tensors = {"x": (x,), "s": hx or (), "w": tuple(weights)}
        wanted = "".join(letter for letter, every in tensors.items() if _any_wants_grad(every))
    if stack.batch_first:
        x = x.transpose(0, 1)
    text = stack.recurrence.text(stack.recurrence.identity)
    states = None if hx is None else list(hx)
    y, *rest = torch.ops.gpu_rnn.stack(x, states, list(weights), text, stack.words(wanted), batch_sizes)
    return y.transpose(0, 1) if stack.batch_first else y, tuple(rest[: len(stack.recurrence.states)])


def _aten_on_gpu(
    stack: Stack, x: Tensor, states: States, weights: Sequence[Tensor], batch_sizes: Tensor | None, training: bool
) -> tuple[Tensor, States]:
    """With dropout each layer is a call, and torch's dropout between them: torch.manual_seed makes it repeat, and
    second derivatives meet the same masks, neither of which holds for cuDNN's own."""
    if stack.dropout and stack.num_layers > 1:
        return _layer_by_layer(stack, x, states, weights, batch_sizes, training)
    run = _with_second_order if training else _aten
    return run(replace(stack, dropout=0.0), x, states, weights, batch_sizes)


def _layer_by_layer(
    stack: Stack, x: Tensor, states: States, weights: Sequence[Tensor], batch_sizes: Tensor | None, training: bool
) -> tuple[Tensor, States]:
    """`_aten_on_gpu` of each layer, with dropout between them."""
    alone, final = replace(stack, num_layers=1, dropout=0.0), []
    rows, count = stack.directions, len(weights) // stack.num_layers
    for number in range(stack.num_layers):
        if number:
            x = F.dropout(x, stack.dropout)
        entering = tuple(state[number * rows : (number + 1) * rows] for state in states)
        of_layer = weights[number * count : (number + 1) * count]
        x, leaving = _aten_on_gpu(alone, x, entering, of_layer, batch_sizes, training)
        final.append(leaving)
    return x, tuple(torch.cat(parts) for parts in zip(*final, strict=True))


def _with_second_order(
    stack: Stack, x: Tensor, states: States, weights: Sequence[Tensor], batch_sizes: Tensor | None
) -> tuple[Tensor, States]:
    """ATen's kernels on a GPU, whose backward pass cannot be differentiated, with the loops for that."""
    count = 1 + len(states)

    def fast(*tensors: Tensor) -> tuple[Tensor, ...]:
        y, final = _aten(stack, tensors[0], tensors[1:count], tensors[count:], batch_sizes)
        return (y, *final)

    def exact(*tensors: Tensor) -> tuple[Tensor, ...]:
        y, final, _ = loops.run(
            replace(stack, backend="auto"), tensors[0], tensors[1:count], tensors[count:], batch_sizes
        )
        return (y, *final)

    y, *final = second_order.differentiable(fast, exact, (x, *states, *weights))
    return y, tuple(final)


def _aten(
    stack: Stack,
    x: Tensor,
    states: States,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    recorded: bool = False,
) -> tuple[Tensor, States]:
    """The whole stack in ATen's kernels; `recorded` as `onlookers.recorded` says."""
    return aten.stack(
        stack.recurrence.aten or "",
        x,
        states,
        weights,
        stack.bias,
        stack.num_layers,
        stack.dropout,
        stack.bidirectional,
        stack.batch_first,
        batch_sizes,
        recorded,
    )


def one_step(stack: Stack, x: Tensor, hx: States | None, weights: Sequence[Tensor]) -> States:
    """`functional.cell` of arguments that are checked already."""
    autocasts = torch._C._is_any_autocast_enabled()
    if autocasts:
        (x,), hx = autocast.cast((x,)), hx and autocast.cast(hx)
    mode, recorded, transformed = stack.recurrence.aten, onlookers.recorded(x), transforms.active()
    if stack.heads == 1 and not transformed:
        # Of one gate a cell has one product a step, for which ATen's call costs less (an AMD EPYC).
        short = mode is None or stack.backend == "native"
        short = short or (x.shape[0] <= limits.MOST_ROWS and len(stack.recurrence.gates) > 1)
        if short and x.is_cpu and not (recorded or autocasts):
            states = hx or stack.initial_of_a_step(x, weights)
            if (found := single_step.run(stack, x, states, weights)) is not None:
                return found
        by_aten = not recorded or torch.compiler.is_compiling() or _recorded_as_aten(stack.backend)
        if mode and stack.backend in ("auto", "aten") and by_aten:
            states = hx or stack.initial_of_a_step(x, weights)
            biases = weights[2:] if stack.bias else (None, None)
            # Under autocast torch's own rule casts the weights: it keeps them for the next step of a loop.
            after = aten.STEPS[mode](x, states if len(states) > 1 else states[0], *weights[:2], *biases)
            return tuple(after) if len(states) > 1 else (after,)
    if recorded and _recorded_in_parts(stack):
        states = hx or tuple(state[0] for state in stack.initial(x[None], weights, x.shape[0]))
        weights = autocast.cast(weights) if autocasts else weights
        text = stack.recurrence.text(stack.recurrence.identity)
        return tuple(torch.ops.gpu_rnn.cell(x, list(states), list(weights), text, stack.words("")))
    states = None if hx is None else tuple(state[None] for state in hx)
    _, final, _ = sequence(stack, x[None], states, weights, None)
    return tuple(state[0].clone() for state in final)  # no views: those cannot be detached in place
