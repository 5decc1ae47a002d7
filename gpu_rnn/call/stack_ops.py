# SPDX-License-Identifier: Apache-2.0
"""A whole stack as one operation, `gpu_rnn::stack`, and its backward pass: what torch.compile records of a plain call.

As it runs it is an eager call, of whatever dispatch chooses, ATen's kernels too, and so is its derivative. What it
keeps has shapes that only the chosen backend knows, so no graph can hold it. It stays here instead, under the address
of one byte that the graph keeps in its place, for as long as the graph does. Where it is gone, as in a backward pass
that runs twice, or a graph made its operands again and may have written where they lay, it is computed anew.

`stack` is what a call names, and has a derivative; a compiler takes that apart into `stack_forward` and
`stack_backward`, which have none: looking for one in Python takes 30 µs of each call.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from gpu_rnn import cells, memo
from gpu_rnn.call import autocast, custom_ops, onlookers, run, second_order
from gpu_rnn.call.stack import RECORDED_FLAGS, Stack
from gpu_rnn.compiler.program import Program
from gpu_rnn.dispatch import choice
from gpu_rnn.memo import memoize

STACK_ARGUMENTS = "Tensor x, Tensor[]? states, Tensor[] weights, str program, str options, Tensor? batch_sizes=None"
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
    goes: ReferenceType[Tensor] | None = None  # what takes it away with the tensor that a graph keeps
    operands: Sequence[int] = ()  # where x, the states and the weights lay


MOST_CALLS = 1024  # whose backward pass is still to come; of more, all are computed anew

_calls: dict[int, Eager] = memo.hold(f"{__name__}: calls", {}, MOST_CALLS)  # by the address of what a graph keeps


def _run(
    stack: Stack,
    wanted: str,
    x: Tensor,
    states: Sequence[Tensor] | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
) -> Eager:
    """The eager call: of tensors of its own where autograd records what is wanted.

    Raises:
        RuntimeError: states of another batch than that of packed data, which no graph knows.
    """
    if batch_sizes is not None and states and states[0].shape[1] != (batch := int(batch_sizes[0])):
        raise RuntimeError(f"Expected states of batch {batch}, as the data is packed, got {states[0].shape[1]}")
    if not wanted:
        with torch.no_grad(), autocast.off(x):
            y, final, _ = run.sequence(stack, x, None if states is None else tuple(states), weights, batch_sizes)
        return Eager([y, *final], [])
    x = x.detach().requires_grad_("x" in wanted)
    hx = None if states is None else tuple(state.detach().requires_grad_("s" in wanted) for state in states)
    weights = [weight.detach().requires_grad_("w" in wanted) for weight in weights]
    with recording(), autocast.off(x):
        y, final, _ = run.sequence(stack, x, hx, weights, batch_sizes)
    return Eager([y, *final], [t for t in (x, *(hx or ()), *weights) if t.requires_grad])


_KEYS = torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView


def recording() -> AbstractContextManager[Any]:
    """Autograd, which torch turns off below an operation, in more ways than one."""
    if any(map(torch._C._dispatch_tls_is_dispatch_key_excluded, _KEYS)):
        return _with_keys()
    return torch.enable_grad()


@contextmanager
def _with_keys() -> Iterator[None]:
    with (
        torch._C._SetExcludeDispatchKeyGuard(_KEYS[0], False),
        torch._C._SetExcludeDispatchKeyGuard(_KEYS[1], False),
        torch.enable_grad(),
    ):
        yield


def _forward(
    x: Tensor,
    states: list[Tensor] | None,
    weights: list[Tensor],
    program: str,
    words: str,
    batch_sizes: Tensor | None = None,
) -> list[Tensor]:
    """y, the final states, and where gradients are wanted the byte that stands for the call."""
    stack, wanted = decode(program, words)
    call = _run(stack, wanted, x, states, weights, batch_sizes)
    if not wanted:
        return custom_ops.owned(call.outputs, (x, *(states or ()), *weights))
    # Copies: a compiler writes to what it was handed, which no version tells, and the backward pass reads y.
    outputs = [output.detach().clone(memory_format=torch.contiguous_format) for output in call.outputs]
    token = torch.empty(1, dtype=torch.uint8, device="cpu")
    if x.is_cpu:  # memory of a GPU may belong to a graph that is captured
        address = token.data_ptr()
        goes = ref(token, lambda _: _calls.pop(address, None))
        kept = Eager(call.outputs, call.leaves, goes, _addresses(x, states, weights))
        memo.put(_calls, address, kept, MOST_CALLS)
    return [*outputs, token]


def _addresses(x: Tensor, states: Sequence[Tensor] | None, weights: Sequence[Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in (x, *(states or ()), *weights)]


def _backward(
    grads: list[Tensor | None],
    token: Tensor | None,
    x: Tensor,
    states: list[Tensor] | None,
    weights: list[Tensor],
    program: str,
    words: str,
    batch_sizes: Tensor | None = None,
) -> list[Tensor]:
    """The gradients of what is wanted, in a row: of x, the states, the weights."""
    call = None if token is None else _calls.pop(token.data_ptr(), None)
    if call is None or call.operands != _addresses(x, states, weights):
        call = _run(*decode(program, words), x, states, weights, batch_sizes)
    pairs = [(out, d) for out, d in zip(call.outputs, grads, strict=True) if d is not None and out.requires_grad]
    found: Sequence[Tensor | None] = [None] * len(call.leaves)
    if pairs:
        outputs, incoming = zip(*pairs, strict=True)
        found = torch.autograd.grad(outputs, call.leaves, incoming, allow_unused=True)
    whole = [torch.zeros_like(leaf) if d is None else d for leaf, d in zip(call.leaves, found, strict=True)]
    return custom_ops.owned(whole, (*grads, x, *(states or ()), *weights))


def _forward_sizes(
    x: Tensor,
    states: list[Tensor] | None,
    weights: list[Tensor],
    program: str,
    words: str,
    batch_sizes: Tensor | None = None,
) -> list[Tensor]:
    stack, wanted = decode(program, words)
    batch = states[0].shape[1] if states else x.shape[1]
    final = [x.new_empty(shape) for shape in stack.state_shapes(weights, batch)]
    y = x.new_empty(*x.shape[:-1], (1 + stack.bidirectional) * final[0].shape[-1])
    return [y, *final, *([x.new_empty(1, dtype=torch.uint8, device="cpu")] if wanted else [])]


def _backward_sizes(
    grads: list[Tensor | None],
    token: Tensor | None,
    x: Tensor,
    states: list[Tensor] | None,
    weights: list[Tensor],
    program: str,
    words: str,
    batch_sizes: Tensor | None = None,
) -> list[Tensor]:
    _, wanted = decode(program, words)
    rows = {"x": [x], "s": states or [], "w": weights}
    likes = [like for letter in wanted for like in rows[letter]]
    return [torch.empty_like(like, memory_format=torch.contiguous_format) for like in likes]


class _Recorded(torch.autograd.Function):
    """`stack` where something wants a derivative; the tensors in a row, which `count` tells apart."""

    @staticmethod
    def forward(
        program: str, words: str, count: int | None, batch_sizes: Tensor | None, x: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        states, weights = _apart(count, tensors)
        return tuple(torch.ops.gpu_rnn.stack_forward(x, states, weights, program, words, batch_sizes))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.program, ctx.words, ctx.count, *tensors = inputs
        ctx.final = len(Program.parse(ctx.program).states)
        token = output[1 + ctx.final :]
        ctx.mark_non_differentiable(*token)
        ctx.save_for_backward(*tensors, *token)
        ctx.tensors = len(tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        saved = ctx.saved_tensors  # each access unpacks once more, which checkpoints refuse
        (batch_sizes, x, *tensors), token = saved[: ctx.tensors], [*saved[ctx.tensors :], None][0]
        if torch.is_grad_enabled() and not onlookers.recorded(x):  # create_graph
            return None, None, None, None, *_differentiable_gradients(ctx, batch_sizes, [x, *tensors], grads)
        states, weights = _apart(ctx.count, tensors)
        needs = ctx.needs_input_grad[4:]
        count = ctx.count or 0
        rows = {"x": needs[:1], "s": needs[1 : 1 + count], "w": needs[1 + count :]}
        options, _, wanted = ctx.words.partition("kept:")
        wanted = wanted or "".join(letter for letter, row in rows.items() if any(row))
        words = f"{options}kept:{wanted}"
        d_outputs = list(grads[: 1 + ctx.final])
        given = x, states, weights, ctx.program, words, batch_sizes
        d = iter(torch.ops.gpu_rnn.stack_backward(d_outputs, token, *given))
        return None, None, None, None, *(next(d) if letter in wanted else None for letter in rows for _ in rows[letter])


def _differentiable_gradients(
    ctx: Any, batch_sizes: Tensor | None, tensors: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Those of an eager call, which have derivatives of their own."""
    stack, _ = decode(ctx.program, ctx.words)
    # Views: what one input owes to another, or to itself at another place, is not this call's to count.
    x, *rest = views = [tensor.view_as(tensor) for tensor in tensors]
    states, weights = _apart(ctx.count, rest)
    with autocast.off(x):
        y, final, _ = run.sequence(stack, x, None if states is None else tuple(states), weights, batch_sizes)
        return second_order.gradient_of((y, *final), views, grads[: 1 + ctx.final], True)


def _apart(count: int | None, tensors: Sequence[Tensor]) -> tuple[list[Tensor] | None, list[Tensor]]:
    """The states, if there are any, and the weights."""
    return None if count is None else list(tensors[:count]), list(tensors[count or 0 :])


def _differentiable(
    x: Tensor,
    states: list[Tensor] | None,
    weights: list[Tensor],
    program: str,
    words: str,
    batch_sizes: Tensor | None = None,
) -> list[Tensor]:
    tensors = [x, *(states or ()), *weights]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return list(_Recorded.apply(program, words, None if states is None else len(states), batch_sizes, *tensors))
    return list(torch.ops.gpu_rnn.stack_forward(x, states, weights, program, words, batch_sizes))


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
_OPERATIONS: dict[str, tuple[str, Callable[..., Any], Callable[..., Any]]] = {
    "stack": ("", _forward, _forward_sizes),
    "stack_forward": ("", _forward, _forward_sizes),
    "stack_backward": ("Tensor?[] grads, Tensor? token, ", _backward, _backward_sizes),
}
for _name, (_first, _kernel, _sizes) in _OPERATIONS.items():
    STACK_LIBRARY.define(f"{_name}({_first}{STACK_ARGUMENTS}) -> Tensor[]", tags=())
    for _device in ("CPU", "CUDA"):
        STACK_LIBRARY.impl(_name, _kernel, _device)
    torch.library.register_fake(f"gpu_rnn::{_name}", _sizes, lib=STACK_LIBRARY)
    torch.library.register_vmap(f"gpu_rnn::{_name}", _one_by_one(_name), lib=STACK_LIBRARY)
STACK_LIBRARY.impl("stack", _differentiable, "Autograd")
