# SPDX-License-Identifier: Apache-2.0
"""A layer's call, from its arguments to the two passes on a backend, under every transform and recorder.

torch has several ways to run a function that is not its own, and no one of them serves all: eager and torch.func need
an autograd.Function, torch.compile and torch.export a registered operation, ATen's kernels neither. What tells them
apart is here, and nothing below knows of it: a backend meets plain tensors and no transform. This room plans and
records; it launches nothing.

In the order of a call: run chooses by what description says of a stack, which stack_ops records as one operation, and
cell_op a cell as plain ones; loops goes through the layers; autograd, custom_ops and vmap are the ways in; passes runs
forward and backward. arguments and checks refuse what no kernel may see, controls brings masks to each layer's layout,
onlookers and transforms say who looks on.
"""
