# SPDX-License-Identifier: Apache-2.0
"""The named sets of shapes that the layers are measured on. Sizes: T steps, B batch, I input features, H hidden
units."""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.cases.options import BOTH, OPTIONS

ALL = ("bf16", "fp16", "fp32", "ieee")
ROUGH = ("bf16", "fp16", "fp32")  # where full fp32 would tell nothing that fp32 does not


@dataclass(frozen=True)
class Problem:
    """A layer, or a stack of layers, and the size of its input.

    Attributes:
        name: unique within its set.
        cell: "LSTM", "GRU" or "RNN".
        T, B, I, H: see the module; with heads I and H are those of one head.
        layers, bidirectional: as torch.nn has them.
        heads: independent recurrences side by side, each with weights and input features of its own: what a
            block-diagonal recurrent matrix is.
        stepwise: the layer's cell is called for each step, as in a decoder.
        streams: the rows are streams, whose states are kept between steps; each step is a call.
        option: what ours runs with, of `options.OPTIONS`; torch.nn, which has none of them, runs without.
        dtypes: what the problem is measured in, by default; see `variants.DTYPES`.
        threads: of the CPU, each a case of its own; () is as many as torch has.
        directions: "forward" is inference, "training" is forward and backward.
        note: where the shape comes from, and what of it is our choice.
    """

    name: str
    cell: str
    T: int
    B: int
    I: int  # noqa: E741
    H: int
    layers: int = 1
    bidirectional: bool = False
    heads: int = 1
    stepwise: bool = False
    streams: bool = False
    option: str = ""
    dtypes: tuple[str, ...] = ALL
    directions: tuple[str, ...] = BOTH
    threads: tuple[int, ...] = ()
    note: str = ""


def named(cell: str, *, T: int, B: int, H: int, I: int | None = None, **more: object) -> Problem:  # noqa: E741
    """A problem named after its sizes; as many input features as units unless I is given."""
    width = H if I is None else I
    parts = [
        f"{cell}{'Cell' * bool(more.get('stepwise'))}-H{H}",
        f"I{width}" * (width != H),
        f"x{more.get('heads')}" * (more.get("heads", 1) != 1),
    ]
    parts += ["streams" * bool(more.get("streams"))]
    parts += [f"L{more.get('layers')}" * ("layers" in more), "bi" * bool(more.get("bidirectional"))]
    name = "-".join(part for part in [*parts, f"B{B}-T{T}", more.get("option", "")] if part)
    return Problem(name, cell, T, B, width, H, **more)  # type: ignore[arg-type]


def _flashrnn() -> list[Problem]:
    note = "FlashRNN (arXiv:2412.07752), model width 768; here each head has the input projection of its own features"
    sizes = [(dim, heads, 16, 1024) for dim, heads in ((16, 48), (32, 24), (64, 12), (128, 6), (256, 3), (768, 1))]
    for dim, heads in ((64, 12), (768, 1)):
        sizes += [(dim, heads, batch, 1024) for batch in (2, 4, 8, 32, 64, 128, 256)]
        sizes += [(dim, heads, 16, steps) for steps in (256, 512, 2048)]
    return [
        named(cell, T=T, B=B, H=dim, heads=heads, note=note) for cell in ("LSTM", "GRU") for dim, heads, B, T in sizes
    ]


def _deepbench() -> list[Problem]:
    note = "DeepBench (github.com/baidu-research/DeepBench), training"
    lstm = [(H, B, 25) for H in (512, 1024, 2048, 4096) for B in (16, 32, 64, 128)]
    lstm += [(1536, B, 50) for B in (8, 16, 32)] + [(256, B, 150) for B in (16, 32, 64)]
    gru = [(H, 32, T) for H in (1536, 2048, 2560, 2816) for T in (1500, 750, 375, 187)]
    gru += [(512, 32, 1), (1024, 32, 1500), (1024, 64, 1500)]
    found = [named("LSTM", T=T, B=B, H=H, note=note) for H, B, T in lstm]
    found += [named("GRU", T=T, B=B, H=H, note=note) for H, B, T in gru]
    note = "DeepBench's batch sizes of inference on its training shapes"
    served = [
        ("LSTM", 256, 150),
        ("LSTM", 512, 25),
        ("LSTM", 1024, 25),
        ("LSTM", 2048, 25),
        ("LSTM", 1536, 50),
    ]
    served += [("GRU", 512, 1), ("GRU", 1024, 1500), ("GRU", 2048, 375), ("GRU", 2816, 187)]
    for cell, H, T in served:
        found += [named(cell, T=T, B=B, H=H, directions=("forward",), note=note) for B in (1, 2, 4)]
    return found


def _haste() -> list[Problem]:
    note = "Haste (github.com/lmnt-com/haste), its charts' batch and input sizes; the hidden sizes are ours"
    return [
        named(cell, T=50, B=B, I=I, H=H, note=note)
        for cell in ("LSTM", "GRU")
        for H in (128, 512, 1024)
        for I in (64, 128, 256, 512)  # noqa: E741
        for B in (1, 32, 64, 128)
    ]


def _applications() -> dict[str, list[Problem]]:
    rnnt = "RNN-T of MLPerf inference; batch and lengths are ours: 15 s of speech, stacked by 3, then by 2"
    gnmt = "GNMT of MLPerf training; the sentence length is ours"
    bonito = "Bonito's basecaller; its layers alternate in direction, here all run forward: the same work"
    rollout = "128 environments, rollouts of 128 steps; with resets beside torch.nn without, which has none"
    served = "one step at a time, as in serving; timed as a CUDA graph on a GPU, and forward only"
    return {
        "rnnt": [
            Problem("encoder-lower", "LSTM", 500, 32, 240, 1024, layers=2, note=rnnt),
            Problem("encoder-upper", "LSTM", 250, 32, 2048, 1024, layers=3, note=rnnt),
            Problem("prediction", "LSTM", 100, 32, 320, 320, layers=2, note=rnnt),
        ],
        "gnmt": [
            Problem("encoder", "LSTM", 50, 128, 1024, 1024, layers=4, note=gnmt),
            Problem("encoder-first", "LSTM", 50, 128, 1024, 1024, bidirectional=True, note=gnmt),
            Problem("decoder", "LSTM", 50, 128, 2048, 1024, layers=4, note=gnmt),
        ],
        "nanopore": [Problem("bonito", "LSTM", 1600, 64, 384, 384, layers=5, note=bonito)],
        "rl": [
            named(cell, T=128, B=128, H=128, option=option, note=rollout)
            for cell in ("LSTM", "GRU")
            for option in ("", "resets")
        ],
        "streaming": [
            named(cell, T=1, B=B, H=H, directions=("forward",), note=served)
            for cell in ("LSTM", "GRU")
            for H in (128, 256, 512, 1024)
            for B in (1, 16, 128)
        ]
        + _streams(),
    }


def _streams() -> list[Problem]:
    note = "20 ticks of so many streams, each of which has a sample at all of them; the sizes are ours"
    return [
        named(cell, T=20, B=B, H=H, streams=True, dtypes=("fp32",), directions=("forward",), threads=(1,), note=note)
        for cell in ("LSTM", "GRU")
        for H in (128, 256)
        for B in (1, 16, 64, 256)
    ]


def _options(sizes: list[dict[str, int]], dtypes: tuple[str, ...], note: str) -> list[Problem]:
    """Each layer without an option, and with each that it has."""
    return [
        named(cell, **size, option=name, dtypes=dtypes, directions=directions, note=note)  # type: ignore[arg-type]
        for cell in ("LSTM", "GRU")
        for size in sizes
        for name, directions in {"": BOTH, **{n: o.directions for n, o in OPTIONS.items() if o.on(cell)}}.items()
    ]


def _scaling() -> list[Problem]:
    note = "how the time grows with the steps, and with layers on top of each other"
    sizes = [(T, 1) for T in (16, 32, 64, 128, 256, 512, 1024, 2048)] + [(256, layers) for layers in (2, 4, 8)]
    return [
        named(cell, T=T, B=64, H=512, **({"layers": layers} if layers > 1 else {}), dtypes=ROUGH, note=note)
        for cell in ("LSTM", "GRU")
        for T, layers in sizes
    ]


def _quick() -> list[Problem]:
    note = "one of each kind: small, stacked, both directions, heads, large, cuDNN's persistent corner, one step"
    return [
        named("LSTM", T=256, B=32, H=64, dtypes=ROUGH, note=note),
        named("LSTM", T=256, B=32, H=128, dtypes=ROUGH, note=note),
        named("GRU", T=256, B=32, H=128, dtypes=ROUGH, note=note),
        named("LSTM", T=128, B=32, H=128, layers=2, bidirectional=True, dtypes=ROUGH, note=note),
        named("LSTM", T=256, B=16, H=64, heads=12, dtypes=ROUGH, note=note),
        named("LSTM", T=50, B=64, H=1024, dtypes=ROUGH, note=note),
        named("GRU", T=50, B=64, H=1024, dtypes=ROUGH, note=note),
        named("LSTM", T=256, B=16, H=768, dtypes=ROUGH, note=note),
        named("LSTM", T=1, B=1, H=256, directions=("forward",), dtypes=ROUGH, note=note),
    ]


def _tiny() -> list[Problem]:
    note = "odd sizes that a CPU runs in no time: does everything work at all?"
    return [
        named("LSTM", T=7, B=3, I=5, H=16, dtypes=("fp32", "bf16"), note=note),
        named("GRU", T=7, B=3, I=5, H=16, dtypes=("fp32",), note=note),
        named("RNN", T=7, B=3, I=5, H=16, dtypes=("fp32",), note=note),
        named("LSTM", T=5, B=2, I=3, H=8, layers=2, bidirectional=True, dtypes=("fp32",), note=note),
        named("LSTM", T=5, B=2, H=8, heads=3, dtypes=("fp32",), note=note),
        named("GRU", T=1, B=1, H=8, directions=("forward",), dtypes=("fp32",), note=note),
    ]


SWEEP = (
    "the options at sizes between the small kernels' and the large ones'; torch.nn, without, is the yardstick of all"
)


CPU_SHAPES = [
    *({"T": 100, "B": 1, "H": H} for H in (64, 128, 256)),
    {"T": 100, "B": 32, "I": 64, "H": 128},
    {"T": 50, "B": 32, "H": 256},
    {"T": 25, "B": 64, "I": 12, "H": 112},
    *({"T": 1, "B": 1, "H": H} for H in (64, 256)),
    {"T": 1, "B": 32, "H": 128},
]


def _cpu() -> list[Problem]:
    note = "small layers as a CPU serves and trains them: one row or a batch, a sequence or one step"
    plain = [
        named(cell, **shape, dtypes=("fp32",), threads=(1, 2), note=note)  # type: ignore[arg-type]
        for shape in CPU_SHAPES
        for cell in ("LSTM", "GRU", "RNN")
    ]
    optional = _options([CPU_SHAPES[k] for k in (3, 0, 6)], ("fp32",), note)
    return [*plain, *(replace(p, threads=(1,)) for p in [*optional, *_decoders()] if p.option or p.stepwise)]


def _cpu_scaling() -> list[Problem]:
    note = "how the time grows with the steps, and with layers on top of each other, on a CPU"
    sizes = [(T, 1) for T in (16, 64, 256, 1024)] + [(64, layers) for layers in (2, 4)]
    return [
        named(cell, T=T, B=8, H=64, **({"layers": layers} if layers > 1 else {}), dtypes=("fp32",), note=note)
        for cell in ("LSTM", "GRU")
        for T, layers in sizes
    ]


def _decoders() -> list[Problem]:
    """Cells: one step, and a decoder's loop of 20."""
    note = "a decoder, which calls a cell for each step; its length is ours"
    options = {"LSTM": ("", "activation", "peephole"), "GRU": ("", "activation", "reset_before"), "RNN": ("",)}
    return [
        named(cell, T=T, B=B, H=H, stepwise=True, option=option, dtypes=("fp32",), note=note)
        for B, H in ((1, 64), (1, 256))
        for cell, names in options.items()
        for option in names
        for T in (1, 20)
    ]


def _demo() -> list[Problem]:
    note = "the demo's layers at JapaneseVowels: batches of 27, 12 channels, the longest of 29 steps"
    return [
        named("LSTM", T=29, B=27, I=12, H=100, bidirectional=True, dtypes=("fp32",), note=note),
        named("GRU", T=29, B=27, I=12, H=100, dtypes=("fp32",), note=note),
    ]


SETS: dict[str, tuple[Problem, ...]] = {
    name: tuple(problems)
    for name, problems in {
        "quick": _quick(),
        "flashrnn": _flashrnn(),
        "deepbench": _deepbench(),
        "haste": _haste(),
        **_applications(),
        "options": _options([{"T": 256, "B": 64, "H": H} for H in (128, 512)], ROUGH, SWEEP),
        "scaling": _scaling(),
        "demo": _demo(),
        "cpu": _cpu(),
        "cpu-scaling": _cpu_scaling(),
        "tiny": _tiny(),
        "tiny-options": _options([{"T": 6, "B": 3, "I": 5, "H": 16}], ("fp32",), "the set options, for a CPU"),
    }.items()
}

FOR_A_CPU = ("cpu", "cpu-scaling")  # what results of a CPU are about

# What `--all` measures, most valuable first, because a run may be cut short: the real networks, then FlashRNN's
# figures, options and scaling, then the large grids. Before them comes `quick`, in bf16 alone.
ORDER = (
    *("rl", "nanopore", "gnmt", "rnnt", "streaming"),
    *("flashrnn", "options", "scaling", "deepbench", "haste", "demo"),
)
