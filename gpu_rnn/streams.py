# SPDX-License-Identifier: Apache-2.0
"""Many sequences at once through one layer, each at its own pace: one call for those that have a sample."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from gpu_rnn.call.stack import States
from gpu_rnn.layers.base import LayerBase
from gpu_rnn.spelling import names_meant

StreamName = TypeVar("StreamName", bound=Hashable)


class Streams:
    """The states of many sequences that run through one layer at the same time.

    A stream is one sequence, by any name that hashes. It joins, gets samples whenever it has some, and leaves. A step
    is one call of the layer for all streams that have a sample; the others stay as they are. A stream's outputs are
    those of its whole sequence in one call, to the rounding of another batch size.

    States lie in one tensor for each state of the layer, (num_layers, capacity + 1, ·), made at the start and made
    anew, twice as large, when a stream more joins. On a GPU a step is a CUDA graph, captured at the first step of so
    many streams, to the next power of two. No gradients are recorded. One thread at a time.

    Args:
        layer: a `gpu_rnn.LSTM`, `GRU`, `RNN` or `Recurrent` of one direction, in evaluation. It stays the caller's:
            weights that change count from the next step on.
        capacity: streams that there is room for. Default: 16
        graphs: whether a step on a GPU is a CUDA graph. Default: True

    Raises:
        TypeError: layer is no layer of this library; capacity is no integer.
        ValueError: it is bidirectional; capacity is not positive.

    Example::

        >>> import gpu_rnn, torch
        >>> streams = gpu_rnn.Streams(gpu_rnn.GRU(4, 8).eval())
        >>> streams.join("ann", "bob")
        >>> outputs = streams.step({"ann": torch.randn(4), "bob": torch.randn(4)})
        >>> outputs = streams.step({"bob": torch.randn(4)})  # ann has no sample
        >>> outputs["bob"].shape
        torch.Size([8])
        >>> streams.leave("ann")
        >>> list(streams)
        ['bob']
    """

    @names_meant
    def __init__(self, layer: LayerBase, capacity: int = 16, *, graphs: bool = True) -> None:
        if not isinstance(layer, LayerBase):
            what = f"streams run through a layer of gpu_rnn, such as gpu_rnn.LSTM, not {type(layer).__name__}"
            theirs = isinstance(layer, nn.RNNBase)
            raise TypeError(f"{what}: gpu_rnn.convert makes one of torch.nn's" if theirs else what)
        if layer.bidirectional:
            raise ValueError("streams have no end for a second direction to begin at: take a layer of one direction")
        if not isinstance(capacity, int):
            raise TypeError(f"capacity should be an integer, got {capacity!r}")
        if capacity < 1:
            raise ValueError(f"capacity should be positive, got {capacity}")
        self.layer, self.graphs = layer, graphs
        self._names: list[Hashable] = []  # by row: streams take the first rows, without a gap
        self._rows: dict[Hashable, int] = {}
        self._last: tuple[list[Hashable], Tensor | None] = ([], None)  # whose step was the last, and their rows
        self._states = self._initial(capacity)
        self._captured: dict[int, _Captured] = {}  # by the streams that they step
        self._captured_with: list[int] = []  # the addresses of the weights

    def __len__(self) -> int:
        return len(self._names)

    def __iter__(self) -> Iterator[Hashable]:
        return iter(self._rows)

    def __contains__(self, name: object) -> bool:
        return name in self._rows

    def __repr__(self) -> str:
        return f"Streams({self.layer!r}, {len(self)} of {self.capacity})"

    @property
    def capacity(self) -> int:
        """Streams that there is room for."""
        return self._states[0].shape[1] - 1

    @torch.no_grad()
    def join(self, *names: Hashable, states: Any = None) -> None:
        """Begin streams.

        Args:
            names: what to call them.
            states: what they begin with, in the form of an unbatched hx: a tensor (num_layers, ·), or a tuple of them
                for a layer with several, of any device and dtype. None: the recurrence's initial values.

        Raises:
            ValueError: there is a stream of that name.
            TypeError, RuntimeError: states of another form or size.
        """
        if twice := [name for name, times in Counter(names).items() if times > 1 or name in self._rows]:
            raise ValueError(f"a stream joins once, and under a name of its own: {twice}, of {names}")
        begin = None if states is None else self._checked(states)
        if len(self) + len(names) > self.capacity:
            self._grow(max(len(self) + len(names), 2 * self.capacity))
        for name in names:
            self._rows[name] = len(self._names)
            self._names.append(name)
        self._set(names, begin)

    @torch.no_grad()
    def leave(self, *names: Hashable) -> None:
        """End streams, and forget their states.

        Raises:
            ValueError: there is no stream of that name, or it stands there twice.
        """
        self._rows_of(names)
        for name in names:
            row, last = self._rows.pop(name), len(self._names) - 1
            moved = self._names.pop()
            if row < last:  # the last stream takes the place
                self._names[row] = moved
                self._rows[moved] = row
                for state in self._states:
                    state[:, row] = state[:, last]
        self._last = ([], None)

    @torch.no_grad()
    def reset(self, *names: Hashable) -> None:
        """Set streams to the recurrence's initial values, as where a new sequence begins.

        Raises:
            ValueError: there is no stream of that name, or it stands there twice.
        """
        self._rows_of(names)
        self._set(names, None)

    def states(self, name: Hashable) -> Any:
        """A copy of a stream's states, as `join` takes them, here or in other `Streams`.

        Raises:
            ValueError: there is no stream of that name.
        """
        (row,) = self._rows_of((name,))
        states = tuple(state[:, row].clone() for state in self._states)
        return states if len(states) > 1 else states[0]

    def step(self, samples: Mapping[StreamName, Tensor]) -> dict[StreamName, Tensor]:
        """Take a step, or several, of the streams that have samples.

        Args:
            samples: by name, of each stream one step, (input_size), or several, (T, input_size), each its own T.

        Returns:
            By name, the h of each step: (hidden_size) or (T, hidden_size); with return_sequences=False the last alone.

        Raises:
            TypeError: samples are no dict, or one of them is no tensor.
            ValueError: there is no stream of a name; the layer is in training; samples of both kinds, or of another
                dtype than the layer's.
            RuntimeError: another number of features. No stream has moved then.
        """
        if not isinstance(samples, Mapping):
            what = f"got {type(samples).__name__}"
            raise TypeError(f"samples are a dict of name and tensor, {what}: step_batch(names, x) takes one tensor")
        if not samples:
            return {}
        names, values = list(samples), list(samples.values())
        if others := [name for name, value in samples.items() if not isinstance(value, Tensor)]:
            what = f"that of {others[0]!r} is of type {type(samples[others[0]]).__name__}"
            raise TypeError(f"samples are tensors, {what}: torch.as_tensor makes one")
        ranks = {value.dim() for value in values}
        if len(ranks) > 1 or not ranks <= {1, 2}:
            raise ValueError(f"samples are (input_size) of all streams or (T, input_size) of all: {_shapes(samples)}")
        if {value.shape[-1] for value in values} != {self.layer.input_size}:
            raise RuntimeError(f"a step of a sample has {self.layer.input_size} features: {_shapes(samples)}")
        lengths = [len(value) for value in values] if ranks == {2} else []
        if len(set(lengths)) < 2 and 0 not in lengths:
            return dict(zip(names, self.step_batch(names, torch.stack(values)).unbind(), strict=True))
        x = torch.nn.utils.rnn.pad_sequence(values, batch_first=True)
        if not x.shape[1]:  # nobody has a step: a layer takes one at least, which no length reaches
            x = x.new_zeros(len(x), 1, x.shape[2])
        outputs = self.step_batch(names, x, lengths)
        if not self.layer.return_sequences:
            return dict(zip(names, outputs.unbind(), strict=True))
        return {name: y[:length] for name, y, length in zip(names, outputs, lengths, strict=True)}

    @torch.no_grad()
    def step_batch(self, names: Sequence[Hashable], x: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        """`step` of samples in one tensor.

        Args:
            names: the streams, each once.
            x: (len(names), input_size) for one step, (len(names), T, input_size) for several.
            lengths: how many of the T steps each has. Default: all

        Returns:
            (len(names), hidden_size), or (len(names), T, hidden_size).

        Raises:
            TypeError: names are one string, or x is no tensor.
            ValueError, RuntimeError: as `step`.
        """
        listable = isinstance(names, Iterable) and not isinstance(names, str)
        if not listable or not isinstance(x, Tensor):
            what = f" and a tensor, got {type(x).__name__}" if listable else f", got {names!r}"
            raise TypeError(f"step_batch takes a list of names{what}")
        if self.layer.training:
            raise ValueError("streams run in evaluation: call layer.eval()")
        if x.dim() not in (2, 3) or len(x) != len(names):
            raise ValueError(f"x should be ({len(names)}, input_size) or ({len(names)}, T, input_size), got {x.shape}")
        if (listed := list(names)) != self._last[0]:
            self._last = (listed, self._places(listed))
        if x.dim() == 2 and self._captures(x):
            return self._replayed(x)
        return self._called(x, self._last[1], lengths)

    def _places(self, names: Sequence[Hashable]) -> Tensor | None:
        """The rows of streams; None where they are the first, in order, which need no gathering."""
        rows = self._rows_of(names)
        if rows == list(range(len(rows))):
            return None
        return torch.tensor(rows, device=self._states[0].device)

    def _rows_of(self, names: Sequence[Hashable]) -> list[int]:
        if unknown := [name for name in names if name not in self._rows]:
            raise ValueError(f"there is no stream {unknown[0]!r}: it joins first")
        if len({*names}) < len(names):
            raise ValueError(f"name each stream once, got {list(names)}")
        return [self._rows[name] for name in names]

    def _called(self, x: Tensor, rows: Tensor | None, lengths: Sequence[int] | None = None) -> Tensor:
        """The step as a call of the layer. States are written when it has succeeded."""
        layer, count = self.layer, len(x)
        if x.dim() == 2:
            sequence = x.unsqueeze(1 if layer.batch_first else 0)
        else:
            sequence = x if layer.batch_first else x.transpose(0, 1)
        before = [s[:, :count] if rows is None else s.index_select(1, rows) for s in self._states]
        try:
            y, after = layer(sequence, tuple(before) if len(before) > 1 else before[0], lengths=lengths)
        except (RuntimeError, ValueError) as error:
            self._explain(error)
            raise
        for state, new in zip(self._states, after if isinstance(after, tuple) else (after,), strict=True):
            if rows is None:
                state[:, :count] = new
            else:
                state.index_copy_(1, rows, new.to(state.dtype))  # autocast's are of 16 bits
        if not layer.return_sequences:
            return y
        if x.dim() == 2:
            return y.squeeze(1 if layer.batch_first else 0)
        return y if layer.batch_first else y.transpose(0, 1)

    def _explain(self, error: Exception) -> None:
        """Raises in words of streams where the layer does not go with their states any more."""
        weight, state = self.layer._weights()[0], self._states[0]
        if (weight.dtype, weight.device) != (state.dtype, state.device):
            now, then = (f"{str(each.dtype).removeprefix('torch.')} on {each.device}" for each in (weight, state))
            raise RuntimeError(
                f"the layer's weights are {now} now, and the states of its streams {then}: make other Streams of the "
                "layer, and take each along by other.join(name, states=streams.states(name))"
            ) from error

    def _captures(self, x: Tensor) -> bool:
        """Whether a step is a graph of its own: not inside of one that the caller captures, nor under autocast, which
        casts what stands outside of it. What the layer refuses is its to refuse."""
        like = self._states[0]
        fits = x.shape[1] == self.layer.input_size and x.dtype == like.dtype and x.device == like.device
        return self.graphs and fits and _on_gpu(x) and not torch.is_autocast_enabled("cuda")

    def _replayed(self, x: Tensor) -> Tensor:
        """`_called` as a graph that steps as many streams as the next power of two, those beyond in the last row."""
        weights = [weight.data_ptr() for weight in self.layer.parameters()]
        if weights != self._captured_with:
            self._captured.clear()
            self._captured_with = weights
        size = min(1 << (len(x) - 1).bit_length(), self.capacity)
        if size not in self._captured:
            with _plain_tensors():
                self._captured[size] = _Captured(self._called, x, size, self.capacity)
        return self._captured[size].step(x, self._last[1])

    def _initial(self, capacity: int) -> States:
        """States for so many streams, and a row that is nobody's."""
        weights = self.layer._weights()
        shapes = self.layer._stack().state_shapes(weights, capacity + 1)
        values = zip(shapes, self.layer.recurrence.initial, strict=True)
        with _plain_tensors():
            return tuple(weights[0].detach().new_full(shape, value) for shape, value in values)

    def _grow(self, capacity: int) -> None:
        states = self._initial(capacity)
        for new, old in zip(states, self._states, strict=True):
            new[:, : len(self)] = old[:, : len(self)]
        self._states = states
        self._captured.clear()

    def _set(self, names: Sequence[Hashable], states: States | None) -> None:
        rows = self._places(names)
        for index, (state, initial) in enumerate(zip(self._states, self.layer.recurrence.initial, strict=True)):
            some = slice(len(names)) if rows is None else rows
            state[:, some] = initial if states is None else states[index].unsqueeze(1)

    def _checked(self, states: Any) -> States:
        """Of one stream, as a tuple, where the streams' are."""
        values = self.layer._as_tuple(states, "states")
        for value, state in zip(values, self._states, strict=True):
            if value.shape != state[:, 0].shape:
                raise RuntimeError(f"states should be {tuple(state[:, 0].shape)} each, got {tuple(value.shape)}")
        return tuple(value.to(state) for value, state in zip(values, self._states, strict=True))


class _Captured:
    """A step of so many streams as a CUDA graph over buffers of its own."""

    def __init__(self, call: Callable[[Tensor, Tensor], Tensor], like: Tensor, size: int, scratch: int) -> None:
        self.scratch = scratch
        self.x = like.new_zeros(size, like.shape[1])
        self.first = torch.arange(size, device=like.device)
        self.rows = torch.full_like(self.first, scratch)  # until there are streams, the step is nobody's
        self.y = call(self.x, self.rows)  # loads what the graph needs
        self.replay = _capture(lambda: self.y.copy_(call(self.x, self.rows)))

    def step(self, x: Tensor, rows: Tensor | None) -> Tensor:
        count = len(x)
        self.x[:count] = x
        self.rows[:count] = self.first[:count] if rows is None else rows
        self.rows[count:] = self.scratch
        self.replay()
        return self.y[:count].clone()


@contextmanager
def _plain_tensors() -> Iterator[None]:
    """What is made under inference_mode can be written only there: buffers that outlive a call are made outside."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda and not torch.cuda.is_current_stream_capturing()


def _capture(run: Callable[[], object]) -> Callable[[], None]:
    """What repeats `run` on the same memory."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        run()
    return graph.replay


def _shapes(samples: Mapping[Any, Tensor]) -> str:
    """Of each shape the first stream that has it, in words."""
    first: dict[tuple[int, ...], Any] = {}
    for name, value in samples.items():
        first.setdefault(tuple(value.shape), name)
    return ", ".join(f"that of {name!r} is {shape}" for shape, name in first.items())
