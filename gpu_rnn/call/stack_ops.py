# SPDX-License-Identifier: Apache-2.0
"""A whole stack as one operation, `gpu_rnn::stack`, and its backward pass: what torch.compile records of a plain call.

As it runs it is an eager call, of whatever dispatch chooses, ATen's kernels too, and so is its derivative. What it
keeps has shapes that only the chosen backend knows, so no graph can hold it. It stays here instead, under a
number that the graph keeps in its place, for as long as the graph does. Where it is gone, as in a backward pass that
runs twice, it is computed anew.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from gpu_rnn import cells, memo
from gpu_rnn.call import autocast, custom_ops, run
from gpu_rnn.call.stack import RECORDED_FLAGS, Stack
from gpu_rnn.compiler.program import Program
from gpu_rnn.dispatch import choice
from gpu_rnn.memo import memoize

STACK_TENSORS = "Tensor x, Tensor[]? states, Tensor[] weights, str program, str options"
STACK_WORDS = re.compile(rf"(\w+) (\d+) (\d+) (\d+) ((?:(?:{'|'.join(RECORDED_FLAGS)}) )*)kept:(x?s?w?)")


@memoize(256)
def decode(text: str, words: str) -> tuple[Stack, str]:
    """The stack, time first, and of what gradients are wanted: "x", "s" of the states, "w" of the weights.

    Raises:
        ValueError: other words than `Stack.words` writes, an unknown backend, a text that is no program.
    """
    found = STACK_WORDS.fullmatch(words)
    if found is None:
        raise ValueError(f"the options of a stack read like 'auto 2 0 1 bias kept:xw', got {words[:80]!r}")
    backend, layers, proj_size, heads, flags, kept = found.groups()
    choice.check_name(backend)
    options: dict[str, Any] = {"num_layers": int(layers), "proj_size": int(proj_size), "heads": int(heads)}
    options |= {name: name in flags.split() for name in RECORDED_FLAGS}
    return Stack(recurrence=cells.of_text(text), backend=backend, **options), kept


class Eager(NamedTuple):
    """A call that ran, as autograd recorded it."""

    outputs: list[Tensor]  # y and the final states
    leaves: list[Tensor]  # of which gradients are wanted
    token: StorageWeakRef | None = None  # of the number that a graph keeps


MOST_CALLS = 1024  # whose backward pass is still to come; of more, all are computed anew

_calls: dict[int, Eager] = memo.hold(f"{__name__}: calls", {}, MOST_CALLS)
_numbers = itertools.count(1)


def _run(stack: Stack, wanted: str, x: Tensor, states: Sequence[Tensor] | None, weights: Sequence[Tensor]) -> Eager:
    """The eager call: of tensors of its own where autograd records what is wanted."""
    if not wanted:
        with torch.no_grad(), autocast.off(x):
            y, final, _ = run.sequence(stack, x, None if states is None else tuple(states), weights, None)
        return Eager([y, *final], [])
    x = x.detach().requires_grad_("x" in wanted)
    hx = None if states is None else tuple(state.detach().requires_grad_("s" in wanted) for state in states)
    weights = [weight.detach().requires_grad_("w" in wanted) for weight in weights]
    with _recording(), autocast.off(x):
        y, final, _ = run.sequence(stack, x, hx, weights, None)
    return Eager([y, *final], [t for t in (x, *(hx or ()), *weights) if t.requires_grad])


@contextmanager
def _recording() -> Iterator[None]:
    """Autograd, which torch turns off below an operation, in more ways than one."""
    key = torch._C.DispatchKey
    with (
        torch._C._SetExcludeDispatchKeyGuard(key.AutogradFunctionality, False),
        torch._C._SetExcludeDispatchKeyGuard(key.ADInplaceOrView, False),
        torch.enable_grad(),
    ):
        yield


def _forward(x: Tensor, states: list[Tensor] | None, weights: list[Tensor], program: str, words: str) -> list[Tensor]:
    """y, the final states, and where gradients are wanted the number of the call."""
    stack, wanted = decode(program, words)
    call = _run(stack, wanted, x, states, weights)
    whole = [output.detach() for output in call.outputs] if wanted else call.outputs
    outputs = custom_ops.owned(whole, (x, *(states or ()), *weights))
    if not wanted:
        return outputs
    number = next(_numbers)
    token = torch.tensor([number], device="cpu")
    for old in [key for key, other in list(_calls.items()) if other.token is None or other.token.expired()]:
        _calls.pop(old, None)
    if x.is_cpu:  # memory of a GPU may belong to a graph that is captured
        memo.put(_calls, number, call._replace(token=StorageWeakRef(token.untyped_storage())), MOST_CALLS)
    return [*outputs, token]


def _backward(
    grads: list[Tensor | None],
    token: Tensor | None,
    x: Tensor,
    states: list[Tensor] | None,
    weights: list[Tensor],
    program: str,
    words: str,
) -> list[Tensor]:
    """The gradients of what is wanted, in a row: of x, the states, the weights."""
    call = None if token is None else _calls.pop(int(token), None)
    call = call or _run(*decode(program, words), x, states, weights)
    pairs = [(out, d) for out, d in zip(call.outputs, grads, strict=True) if d is not None and out.requires_grad]
    found: Sequence[Tensor | None] = [None] * len(call.leaves)
    if pairs:
        outputs, incoming = zip(*pairs, strict=True)
        found = torch.autograd.grad(outputs, call.leaves, incoming, allow_unused=True)
    whole = [torch.zeros_like(leaf) if d is None else d for leaf, d in zip(call.leaves, found, strict=True)]
    given = [d for d in grads if d is not None]
    return custom_ops.owned([d.detach() for d in whole], (*given, x, *(states or ()), *weights))


def _forward_sizes(
    x: Tensor, states: list[Tensor] | None, weights: list[Tensor], program: str, words: str
) -> list[Tensor]:
    stack, wanted = decode(program, words)
    steps, batch, _ = x.shape
    final = [x.new_empty(shape) for shape in stack.state_shapes(weights, batch)]
    y = x.new_empty(steps, batch, (1 + stack.bidirectional) * final[0].shape[-1])
    return [y, *final, *([x.new_empty(1, dtype=torch.int64, device="cpu")] if wanted else [])]


def _backward_sizes(
    grads: list[Tensor | None],
    token: Tensor | None,
    x: Tensor,
    states: list[Tensor] | None,
    weights: list[Tensor],
    program: str,
    words: str,
) -> list[Tensor]:
    _, wanted = decode(program, words)
    rows = {"x": [x], "s": states or [], "w": weights}
    likes = [like for letter in wanted for like in rows[letter]]
    return [torch.empty_like(like, memory_format=torch.contiguous_format) for like in likes]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, states, weights, ctx.program, ctx.words = inputs
    ctx.states, ctx.has_states, ctx.has_token = len(states or ()), states is not None, not ctx.words.endswith(":")
    ctx.final = len(Program.parse(ctx.program).states)
    ctx.save_for_backward(x, *(states or ()), *weights, *output[1 + ctx.final :])


def _derivative(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    x, *rest = ctx.saved_tensors  # each access unpacks once more, which checkpoints refuse
    token = rest.pop() if ctx.has_token else None
    states, weights = rest[: ctx.states] if ctx.has_states else None, rest[ctx.states :]
    of_x, of_states, of_weights, *_ = ctx.needs_input_grad
    needed = {"x": bool(of_x), "s": bool(ctx.states) and _any(of_states), "w": _any(of_weights)}
    wanted = ctx.words.partition("kept:")[2] or "".join(letter for letter, is_needed in needed.items() if is_needed)
    words = ctx.words.partition("kept:")[0] + f"kept:{wanted}"
    d = iter(torch.ops.gpu_rnn.stack_backward(grads[: 1 + ctx.final], token, x, states, weights, ctx.program, words))
    d_x = next(d) if "x" in wanted else None
    d_states = [next(d) if "s" in wanted else None for _ in states] if states is not None else None
    d_weights = [next(d) if "w" in wanted else None for _ in weights]
    return d_x, d_states, d_weights, None, None


def _any(needs: Any) -> bool:
    return any(needs) if isinstance(needs, (list, tuple)) else bool(needs)


def _one_by_one(name: str) -> Callable[..., Any]:
    """The rule of torch.vmap: a call for each member, whose weights may be its own."""

    def member(value: Any, dim: Any, number: int) -> Any:
        if isinstance(value, (list, tuple)):
            return [member(each, d, number) for each, d in zip(value, dim, strict=True)]
        return value if dim is None else value.select(dim, number)

    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[list[Tensor], list[int]]:
        operation = getattr(torch.ops.gpu_rnn, name)
        every = [
            operation(*(member(value, dim, number) for value, dim in zip(arguments, in_dims, strict=True)))
            for number in range(info.batch_size)
        ]
        outputs = [torch.stack(parts) for parts in zip(*every, strict=True)]
        return outputs, [0] * len(outputs)

    return rule


STACK_LIBRARY = torch.library.Library("gpu_rnn", "FRAGMENT")  # without what torch.library.custom_op checks at each call
STACK_LIBRARY.define(f"stack({STACK_TENSORS}) -> Tensor[]", tags=())
STACK_LIBRARY.define(f"stack_backward(Tensor?[] grads, Tensor? token, {STACK_TENSORS}) -> Tensor[]", tags=())
for _name, _kernel, _sizes in (("stack", _forward, _forward_sizes), ("stack_backward", _backward, _backward_sizes)):
    for _device in ("CPU", "CUDA"):
        STACK_LIBRARY.impl(_name, _kernel, _device)
    torch.library.register_fake(f"gpu_rnn::{_name}", _sizes, lib=STACK_LIBRARY)
    torch.library.register_vmap(f"gpu_rnn::{_name}", _one_by_one(_name), lib=STACK_LIBRARY)
torch.library.register_autograd("gpu_rnn::stack", _derivative, setup_context=_setup, lib=STACK_LIBRARY)
