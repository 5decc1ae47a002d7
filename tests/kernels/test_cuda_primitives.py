# SPDX-License-Identifier: Apache-2.0
"""Each function of kernels/cuda/device.cuh beside a plain formula, on the CPU and on a GPU.

Fragments are laid out here by the tables of the PTX ISA, "Matrix Fragments for mma.m16n8k16" and those for
mma.m16n8k8; neither the CPU's bodies nor the kernels of primitives.cu share that text.
"""

import math
import re
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.emulating.build import CUDA, HERE, load, run
from gpu_rnn.backends.group import nvrtc
from tests.support.cuda import relay
from tests.support.cuda.machines import NEEDS_COMPILER, Machine, on_cpu, on_gpu

PLACES = [
    pytest.param(on_cpu, marks=[pytest.mark.cuda_cpu, NEEDS_COMPILER]),
    pytest.param(on_gpu, marks=pytest.mark.gpu),
]
ON_BOTH = pytest.mark.parametrize("machine", PLACES)
SOURCE = relay.SOURCE.with_name("primitives.cu")
LANE = torch.arange(32)[:, None]
GROUP, IN_GROUP = LANE // 4, LANE % 4  # groupID and threadID_in_group of the ISA


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def words(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.int32)


def a_halves() -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and columns of a0 to a7 of every lane, 16-bit operands."""
    i = torch.arange(8)
    row = torch.where((i < 2) | ((4 <= i) & (i < 6)), GROUP, GROUP + 8)
    return row, IN_GROUP * 2 + (i & 1) + torch.where(i >= 4, 8, 0)


def b_halves() -> tuple[torch.Tensor, torch.Tensor]:
    i = torch.arange(4)
    return IN_GROUP * 2 + (i & 1) + torch.where(i >= 2, 8, 0), GROUP.expand(32, 4)


def a_tf32() -> tuple[torch.Tensor, torch.Tensor]:
    i = torch.arange(4)
    return torch.where((i == 0) | (i == 2), GROUP, GROUP + 8), torch.where(i < 2, IN_GROUP, IN_GROUP + 4)


def b_tf32() -> tuple[torch.Tensor, torch.Tensor]:
    i = torch.arange(2)
    return torch.where(i == 0, IN_GROUP, IN_GROUP + 4), GROUP.expand(32, 2)


def accumulators() -> tuple[torch.Tensor, torch.Tensor]:
    i = torch.arange(4)
    return torch.where(i < 2, GROUP, GROUP + 8), IN_GROUP * 2 + (i & 1)


def product(machine: Machine, kernel: str, a: torch.Tensor, b: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """d + a b by the kernel, each operand as its lanes hold it."""
    a_at, b_at = (a_tf32(), b_tf32()) if a.dtype == torch.float32 else (a_halves(), b_halves())
    registers = d[accumulators()].contiguous()
    operands = [value[at].contiguous().view(torch.int32) for value, at in ((a, a_at), (b, b_at))]
    machine(SOURCE, kernel, 1, 32, 0, [*operands, registers])
    result = torch.full_like(d, math.nan)
    result[accumulators()] = registers
    return result


@ON_BOTH
@pytest.mark.parametrize("kernel, dtype", [("multiply_f16", torch.float16), ("multiply_bf16", torch.bfloat16)])
def test_products_of_halves(machine: Machine, kernel: str, dtype: torch.dtype) -> None:
    a, b, d = random(16, 16).to(dtype), random(16, 8).to(dtype), random(16, 8)
    expected = d.double() + a.double() @ b.double()
    # Products are exact in float; 16 additions, each within 2^-22 of sums below 32 (tensor cores truncate).
    torch.testing.assert_close(product(machine, kernel, a, b, d).double(), expected, rtol=0, atol=16 * 32 * 2**-22)


@ON_BOTH
def test_products_of_tf32_read_no_low_bits(machine: Machine) -> None:
    a, b, d = random(16, 8), random(8, 8), random(16, 8)
    cut_a, cut_b = ((value.view(torch.int32) & ~0x1FFF).view(torch.float32) for value in (a, b))
    assert (a != cut_a).all()
    expected = d.double() + cut_a.double() @ cut_b.double()
    torch.testing.assert_close(
        product(machine, "multiply_tf32", a, b, d).double(), expected, rtol=0, atol=8 * 32 * 2**-22
    )


@ON_BOTH
def test_copies_arrive_or_are_zero(machine: Machine) -> None:
    data, valid = random(64, 4), torch.arange(64, dtype=torch.int32) % 3
    out = torch.full((64, 4), math.nan)
    machine(SOURCE, "copy", 1, 64, 64 * 16, [data, valid, out])
    assert torch.equal(out, torch.where(valid[:, None] != 0, data, 0.0).roll(-1, 0))


@ON_BOTH
@pytest.mark.parametrize("mask", [1, 16, 21])
def test_shuffles(machine: Machine, mask: int) -> None:
    data = random(32)
    source = torch.randint(32, (32,), dtype=torch.int32, generator=torch.Generator().manual_seed(1))
    out = torch.full((32, 4), math.nan)
    machine(SOURCE, "shuffles", 1, 32, 0, [data, mask, source, out])
    swapped, picked = data[torch.arange(32) ^ mask], data[source.long()]
    assert torch.equal(out, torch.stack([swapped, picked, swapped, picked], 1))


def every_kind_of_float() -> torch.Tensor:
    """Random bits, all magnitudes of 16-bit numbers with the ties between them, and the special ones."""
    bits = torch.randint(-(2**31), 2**31, (20000,), generator=torch.Generator().manual_seed(0)).int()
    half, brain = (
        torch.arange(0x7C00).short().view(torch.float16).float(),
        torch.arange(0x7F80).short().view(torch.bfloat16).float(),
    )
    ties = [(values[1:] / 2 + values[:-1] / 2) for values in (half, brain)]
    tf32_ties = (bits & ~0x1FFF | 0x1000).view(torch.float32)
    special = torch.tensor([math.inf, math.nan, 0.0, 65504, 65519.996, 65520, 3.4028235e38, 1e-45])
    values = torch.cat([bits.view(torch.float32), half, brain, *ties, tf32_ties, special])
    return torch.cat([values, -values])


def nearest_tf32(x: torch.Tensor) -> torch.Tensor:
    """Eleven significant bits, ties away from zero: PTX's cvt.rna.tf32."""
    wide = x.double()
    exponent = torch.frexp(wide).exponent.clamp(min=-125)  # below lie the subnormal numbers
    step = torch.exp2((exponent - 11).double())
    rounded = torch.copysign(torch.floor(wide.abs() / step + 0.5) * step, wide)
    return torch.where(wide.isfinite(), rounded, wide).float()


@ON_BOTH
def test_rounding(machine: Machine) -> None:
    x = every_kind_of_float()
    half, brain, tf32 = words(len(x)), words(len(x)), torch.zeros(len(x))
    machine(SOURCE, "round_floats", 1, 128, 0, [x, len(x), half, brain, tf32])
    for packed, dtype in ((half, torch.float16), (brain, torch.bfloat16)):
        pair = packed[:, None].view(dtype)
        torch.testing.assert_close(pair, torch.stack([x, -x], 1).to(dtype), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(tf32, nearest_tf32(x), rtol=0, atol=0, equal_nan=True)


@ON_BOTH
def test_special_functions_are_as_near_as_the_isa_says(machine: Machine) -> None:
    x = torch.cat([torch.linspace(-140, 140, 20001), 2.0 ** torch.arange(-125, 126), random(1000)])
    power, reciprocal, root = (torch.zeros(len(x)) for _ in range(3))
    machine(SOURCE, "approximate", 1, 128, 0, [x, len(x), power, reciprocal, root])
    smallest = torch.finfo(torch.float32).tiny  # what is smaller may become 0
    exact_root = x.double().rsqrt().where(x > smallest, math.inf)
    for found, exact, bound in (
        (power, torch.exp2(x.double()), 2**-22), (reciprocal, 1 / x.double(), 2**-23), (root, exact_root, 2**-22.9),
    ):  # fmt: skip
        inside = (exact.abs() < 2.0**127) & (exact.abs() >= smallest)
        assert ((found - exact).abs() <= bound * exact.abs() + smallest)[inside].all()
        assert (found[exact.abs() < smallest] < 2 * smallest).all()
    x = torch.tensor([math.inf, -math.inf, 200.0, -200.0, math.nan])
    power, reciprocal, root = (torch.zeros(len(x)) for _ in range(3))
    machine(SOURCE, "approximate", 1, 128, 0, [x, len(x), power, reciprocal, root])
    assert power[:4].tolist() == [math.inf, 0, math.inf, 0] and power[4].isnan()
    assert reciprocal[:2].tolist() == [0, 0] and reciprocal[4].isnan()
    assert root[0] == 0 and root[1].isnan() and root[3:].isnan().all()


@ON_BOTH
def test_widening_is_exact(machine: Machine) -> None:
    half, brain = torch.zeros(65536), torch.zeros(65536)
    machine(SOURCE, "widen", 1, 128, 0, [half, brain])
    bits = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    for found, dtype in ((half, torch.float16), (brain, torch.bfloat16)):
        torch.testing.assert_close(found, bits.view(dtype).float(), rtol=0, atol=0, equal_nan=True)


@ON_BOTH
def test_words_of_both_sizes(machine: Machine) -> None:
    data, wide = random(64), torch.arange(64, dtype=torch.int64) << 40
    out, wide_out = torch.zeros(64), torch.zeros(64, dtype=torch.int64)
    machine(SOURCE, "words", 1, 64, 0, [data, out, wide, wide_out])
    assert torch.equal(out, data + 1) and torch.equal(wide_out, wide + 1)


@ON_BOTH
def test_each_count_is_given_once(machine: Machine) -> None:
    counter, before = words(1), words(64)
    machine(SOURCE, "count", 1, 64, 0, [counter, before])
    assert counter.item() == 64 and sorted(before.tolist()) == list(range(64))


@ON_BOTH
def test_indices(machine: Machine) -> None:
    out = words(3, 64, 6)
    machine(SOURCE, "indices", 3, 64, 0, [out])
    thread, block = torch.arange(64).expand(3, 64), torch.arange(3)[:, None].expand(3, 64)
    constant = partial(torch.full_like, thread)
    expected = torch.stack([thread, block, constant(64), constant(3), thread % 32, thread // 32], -1)
    assert torch.equal(out.long(), expected)


@ON_BOTH
@pytest.mark.parametrize("kernel", relay.BLOCKS)
def test_relay(machine: Machine, kernel: str) -> None:
    """Each way to pass a number on; test_cuda_runtime.py breaks them."""
    grid, block, shared_bytes, arguments, h, expected = relay.problem(kernel)
    machine(relay.SOURCE, kernel, grid, block, shared_bytes, arguments)
    assert torch.equal(h, expected)


@pytest.mark.cuda_cpu
@NEEDS_COMPILER
def test_words_of_both_sizes_go_to_the_next_block() -> None:
    """On the CPU: a GPU's clusters are tested with the kernels that use them."""
    data, wide = random(3, 64), torch.arange(192, dtype=torch.int64).reshape(3, 64) << 40
    out, wide_out = torch.zeros(3, 64), torch.zeros(3, 64, dtype=torch.int64)
    run(load(relay.CLUSTERS), "pass_on", 3, 64, 64 * 12 + 8, [data, out, wide, wide_out], cluster=3)
    assert torch.equal(out, data.roll(1, 0)) and torch.equal(wide_out, wide.roll(1, 0))


@pytest.mark.compile("nvrtc")
@pytest.mark.parametrize("arch", ["sm_90a", "sm_100", "sm_120"])
def test_clusters_compile_for(arch: str) -> None:
    assert nvrtc.compile_cubin(relay.CLUSTERS.read_text(), arch)


@pytest.mark.compile("nvrtc")
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120"])
@pytest.mark.parametrize("source", [SOURCE, relay.SOURCE], ids=["primitives", "relay"])
def test_the_header_compiles_for(arch: str, source: Path) -> None:
    assert nvrtc.compile_cubin(source.read_text(), arch)


def test_both_halves_of_the_header_say_the_same() -> None:
    """The same functions, in the same order, with the same parameters."""
    declaration = re.compile(r"^(?:template <[^\n]*> )?DEVICE [\w ]+[ *]+(\w+(?:<\w+>)?)\([^{;]*\)", re.M)
    own = {"shared_address"}  # a step of one half only

    def signatures(text: str) -> list[str]:
        text = re.sub(r"//[^\n]*", "", text).replace(">\nDEVICE", "> DEVICE")
        return [" ".join(match[0].split()) for match in declaration.finditer(text) if match[1] not in own]

    gpu = (CUDA / "device.cuh").read_text().split("#else")[1].split("#endif")[0]
    assert signatures(gpu) == signatures((HERE / "device_cpu.h").read_text())
    assert len(signatures(gpu)) > 30
