# SPDX-License-Identifier: Apache-2.0
"""From a step function to a program, its derivative and its kernels. It knows no layer, no backend and no device.

In the order to read, in which each file imports from those above it only:

operations      the table of scalar operations: torch, Triton, CUDA, C, derivative; `Op`, one of them with its arguments
evaluation      operations as one function of torch tensors
program         `Program`: stages of operations, and the canonical text that is a cell's identity
builder         values whose operators emit operations: how programs and derivatives are written here
lowering        torch's operations in those of the table
recording       what a step function does with scalars, as torch's dispatcher meets it
tracing         from a step function to a program: recording, lowering, errors that name the line
derivative      the reverse-mode derivative of a stage
jacobian        the partial derivatives alone, for a loop that multiplies by them
torch_fusion    fewer operations for torch, which has some for several
codegen         a stage and its derivative as Triton, CUDA C++ and C
onnx_nodes      operations as nodes of an ONNX graph
triton_module   the Triton text as a module that Triton can compile
"""
