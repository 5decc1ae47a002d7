# SPDX-License-Identifier: Apache-2.0
"""A name that is misspelt, in a constructor or a call, is answered with the one that was perhaps meant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import gpu_rnn
from gpu_rnn import cells, functional, spelling
from gpu_rnn.layers.options import DEFAULTS, OF_THE_CALL

X = torch.zeros(3, 2, 4)
LAYERS: dict[str, Callable[..., Any]] = {
    "RNN": gpu_rnn.RNN,
    "LSTM": gpu_rnn.LSTM,
    "GRU": gpu_rnn.GRU,
    "Recurrent": lambda *args, **options: gpu_rnn.Recurrent(cells.gru(), *args, **options),
}
MISSPELT: dict[str, tuple[Callable[[], Any], str]] = {
    "a cell": (lambda: gpu_rnn.GRUCell(4, 5, reset_afer=False), "GRUCell.*; did you mean reset_after?"),
    "a cell's call": (lambda: gpu_rnn.LSTMCell(4, 5)(X[0], hxx=None), "^LSTMCell.forward.*; did you mean hx?"),
    "functional.rnn": (
        lambda: functional.rnn(X, None, [], cells.gru(), length=[3, 3]),
        r"^rnn\(\) got an unexpected keyword argument 'length'; did you mean lengths?",
    ),
    "functional.cell": (lambda: functional.cell(X[0], None, [], cells.gru(), bakend="step"), "; did you mean backend?"),
    "debug": (lambda: gpu_rnn.debug(gpu_rnn.GRU(4, 5), X, backends="step"), "; did you mean backend?"),
    "a recurrence of one's own": (lambda: gpu_rnn.Recurrence(print, gate=("a",)), "; did you mean gates?"),
    "its source": (lambda: cells.gru().source(backwards=True), "; did you mean backward?"),
    "streams": (lambda: gpu_rnn.Streams(gpu_rnn.GRU(4, 5), capasity=3), "Streams.*; did you mean capacity?"),
    "a recurrence": (lambda: cells.lstm(peepholes=True), r"lstm\(\) .*; did you mean peephole?"),
    "convert": (lambda: gpu_rnn.convert(nn.GRU(4, 5), recurent_dropout=0.1), "; did you mean recurrent_dropout?"),
    "convert's own": (lambda: gpu_rnn.convert(nn.GRU(4, 5), too="torch"), "; did you mean to?"),
    "explain": (lambda: gpu_rnn.explain(gpu_rnn.GRU(4, 5), X, length=True), "length; did you mean lengths?"),
    "explain's own": (lambda: gpu_rnn.explain(gpu_rnn.GRU(4, 5), X, devices="H100"), "devices; did you mean device?"),
    "tune": (lambda: gpu_rnn.tune(gpu_rnn.GRU(4, 5), X, masks=X[..., 0] == 0), "masks; did you mean mask?"),
}


@pytest.mark.parametrize("name", MISSPELT)
def test_a_misspelt_name_is_answered(name: str) -> None:
    call, words = MISSPELT[name]
    with pytest.raises(TypeError, match=words.replace("?", r"\?")):
        call()


@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_answers_every_misspelt_option_and_argument(kind: str) -> None:
    for name in DEFAULTS:
        for misspelt in (f"{name}s", name.replace("_", "", 1) if "_" in name else name[:-1]):
            with pytest.raises(TypeError, match=rf"unexpected keyword argument {misspelt!r}; did you mean {name}\? "):
                LAYERS[kind](4, 5, **{misspelt: 1})
    layer = LAYERS[kind](4, 5)
    for name in OF_THE_CALL:
        misspelt = f"{name}e"
        words = rf"^{kind}.forward\(\) got an unexpected keyword argument {misspelt!r}"
        with pytest.raises(TypeError, match=words + (rf"; did you mean {name}\?$" if len(name) > 2 else "")):
            layer(X, **{misspelt: None})


def test_errors_from_inside_are_left_alone() -> None:
    @spelling.names_meant
    def outer(value: int = 0) -> None:
        inner(valu=1)  # type: ignore[call-arg]

    def inner(value: int) -> None:
        raise AssertionError

    with pytest.raises(TypeError, match=r"'valu'$"):
        outer()
    with pytest.raises(TypeError, match=r"'valu'; did you mean value\?$"):
        outer(valu=1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"2 were given$"):
        outer(1, 2)  # type: ignore[call-arg]
