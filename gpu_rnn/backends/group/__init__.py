# SPDX-License-Identifier: Apache-2.0
"""W_hh on chip between the blocks of a group: CUDA C++ through CuPy.

CUDA C++, because blocks that wait for each other need what Triton does not offer: words in memory that many blocks
poll, with orders of access, and the certainty that all are on the device at once. CuPy, because it brings NVRTC and a
loader: nothing has to be compiled when the package is installed.

choice ranks layouts, layout says what one is made of, nvrtc and cubin make and read machine code, signature orders a
kernel's arguments by their names, deadline is what ends a wait, launch puts them together.
"""
