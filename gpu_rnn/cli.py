# SPDX-License-Identifier: Apache-2.0
"""The gpu-rnn command: doctor, explain, tune, convert, demo, bench. Each command imports what it needs when it runs."""

from __future__ import annotations

import argparse
import difflib
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from gpu_rnn._version import __version__

if TYPE_CHECKING:
    import torch

    from gpu_rnn.layers.base import LayerBase

__all__ = ["Parser", "main", "positive"]

INTERRUPTED = 130  # 128 + SIGINT, what a shell reports for Ctrl-C
INT64_MAX = 2**63 - 1  # size of a tensor
UNREAD = 141  # likewise 128 + SIGPIPE
DEVICE_HELP = "cpu, cuda or cuda:1 (default: the GPU if there is one)"
FLAGS = {"reset_after": "--reset-before", "proj_size": "--proj"}  # those that are not named as the layers' arguments
DTYPE_NAMES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32", "fp64": "float64"}


class Parser(argparse.ArgumentParser):
    """One that says which option was perhaps meant."""

    _asked: Sequence[str] = ()

    def refuse(self, unknown: Sequence[str]) -> NoReturn:
        """Leaves with what arguments nobody knows, and with what is spelt alike."""
        self.error(f"unrecognized arguments: {' '.join(unknown)}{self._advice(unknown)}")

    @property
    def _known(self) -> list[str]:
        return [option for action in self._actions for option in action.option_strings]

    def _strange(self, words: Sequence[str]) -> list[str]:
        options = (word.partition("=")[0] for word in words if word.startswith("--"))
        return [option for option in options if not any(each.startswith(option) for each in self._known)]

    def _advice(self, words: Sequence[str]) -> str:
        strange = self._strange(words)
        meant = [near for option in strange for near in difflib.get_close_matches(option, self._known, 1)]
        return f"; did you mean {', '.join(meant)}?" if meant else ""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self._asked = sys.argv[1:] if args is None else args
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """One that is misspelt is missed before it is not known: what it is called is said, not what is missing."""
        if "are required: " in message and self._advice(self._asked):
            self.refuse(self._strange(self._asked))
        super().error(message)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.refuse(unknown)
        return parsed


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    parsed, unknown = _parser().parse_known_args(arguments)
    if unknown:  # argparse itself would show the usage of gpu-rnn, which does not list a command's options
        parsed.parser.refuse(unknown)
    try:
        status = parsed.command(parsed)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("gpu-rnn: stopped.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # whoever read has seen enough, and there is nobody to tell when Python flushes at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return UNREAD
    except (ModuleNotFoundError, ValueError) as error:
        print(f"gpu-rnn: {error}", file=sys.stderr)
        return 1


def _doctor(options: argparse.Namespace) -> int:
    from gpu_rnn import devices
    from gpu_rnn.diagnostics import doctor

    print(doctor.report(devices.pick(options.device)))
    return 0


def _demo(options: argparse.Namespace) -> int:
    from gpu_rnn import devices
    from gpu_rnn.demo import command

    command.run(
        command.Settings(
            device=devices.pick(options.device),
            seeds=options.seeds,
            epochs=options.epochs,
            long=options.long,
            quick=options.quick,
            out=options.out,
        )
    )
    return 0


def _bench(options: argparse.Namespace) -> int:
    from gpu_rnn import devices
    from gpu_rnn.demo import command
    from gpu_rnn.demo.datasets import japanese_vowels, plaid

    data = plaid() if options.long else japanese_vowels()
    command.bench(data.to(devices.pick(options.device)), options.seconds)
    return 0


def _explain(options: argparse.Namespace) -> int:
    import gpu_rnn
    from gpu_rnn import devices

    layer, x = _described_call(options, "meta")  # which takes no memory
    print(gpu_rnn.explain(layer, x, device=options.device or devices.pick(None)))
    return 0


def _tune(options: argparse.Namespace) -> int:
    import gpu_rnn
    from gpu_rnn import devices

    device = devices.pick(options.device)
    able = sum(row.runs for row in gpu_rnn.explain(*_described_call(options, "meta"), device=device).rows)
    layer, x = _described_call(options, device)
    passes = ["forward", "then forward and backward"] if options.training else ["forward"]
    about = f"about {len(passes) * options.seconds:g} s, longer where three calls of each take longer"
    print(f"measuring {able} backends, {', '.join(passes)}, {about}", file=sys.stderr, flush=True)
    try:
        tuned = gpu_rnn.tune(layer, x, seconds=options.seconds)
    except KeyboardInterrupt:
        print("gpu-rnn: stopped; nothing was kept.", file=sys.stderr)
        return INTERRUPTED
    print(tuned)
    return int(not tuned.lasting)  # what no other process finds was in vain


def _convert(options: argparse.Namespace) -> int:
    from gpu_rnn.diagnostics import conversion_preview

    print(conversion_preview.report(options.file, options.trust))
    return 0


def _described_call(options: argparse.Namespace, device: torch.device | str) -> tuple[LayerBase, torch.Tensor]:
    """The layer that the options describe, and an input for it."""
    import torch

    dtype = getattr(torch, DTYPE_NAMES[options.dtype])
    try:
        with torch.device(device):
            layer = _described_layer(options).to(dtype).train(options.training).requires_grad_(options.training)
            return layer, torch.randn(options.steps, options.batch, options.input or options.hidden, dtype=dtype)
    except (OverflowError, RuntimeError) as error:
        raise ValueError(f"no tensors of such sizes can be made on {device}: {str(error).splitlines()[0]}") from error


def _described_layer(options: argparse.Namespace) -> LayerBase:
    import gpu_rnn

    all_options = {
        "activation": options.activation,
        "recurrent_activation": options.recurrent_activation,
        "reset_after": False if options.reset_before else None,
        "peephole": options.peephole or None,
        "proj_size": options.proj,
        "clip": options.clip,
        "zoneout": options.zoneout,
        "recurrent_dropout": options.recurrent_dropout,
        "save": options.save,
        "heads": options.heads,
        "layer_norm": options.layer_norm or None,
        "rms_norm": options.rms_norm or None,
    }
    layer_options = {name: value for name, value in all_options.items() if value is not None}
    cell = options.cell.upper()
    make = getattr(gpu_rnn, cell)
    known = {*inspect.signature(make).parameters} - ({"proj_size"} if cell != "LSTM" else set())  # there to be refused
    unknown = [FLAGS.get(name, f"--{name.replace('_', '-')}") for name in layer_options if name not in known]
    if unknown:
        raise ValueError(f"{'a' if cell == 'GRU' else 'an'} {cell} has no {', '.join(unknown)}")
    features = options.input or options.hidden
    return make(features, options.hidden, options.layers, bidirectional=options.bidirectional, **layer_options)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="gpu-rnn",
        description="LSTM, GRU and any other recurrence on the GPU, as drop-ins for torch.nn.",
        epilog="examples:\n"
        "  gpu-rnn demo                     train on real recordings beside torch.nn, and draw a picture\n"
        "  gpu-rnn doctor                   what is here, and which backends can run\n"
        "  gpu-rnn explain --hidden 512 --batch 64 --dtype bf16 --device H100\n"
        "  gpu-rnn tune --hidden 512 --batch 64 --dtype bf16",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"gpu-rnn {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_demo(commands)
    doctor = commands.add_parser("doctor", help="what is here, and which backends can run and why not the others")
    doctor.add_argument("--device", help=DEVICE_HELP)
    doctor.set_defaults(command=_doctor, parser=doctor)
    _add_explain(commands)
    _add_tune(commands)
    _add_convert(commands)
    _add_bench(commands)
    return parser


def _add_demo(commands: argparse._SubParsersAction) -> None:
    demo = commands.add_parser(
        "demo",
        help="train on real recordings beside torch.nn, time both, draw a picture",
        description="Trains a bidirectional LSTM and a GRU on the JapaneseVowels recordings with torch.nn and with "
        "gpu_rnn from the same seeds, trains them again with options that torch.nn does not have, times every layer "
        "on this device, and writes one picture.",
        epilog="examples:\n"
        "  gpu-rnn demo\n"
        "  gpu-rnn demo --quick --out /tmp/demo.png\n"
        "  gpu-rnn demo --long --device cuda:1",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    demo.add_argument("--device", help=DEVICE_HELP)
    demo.add_argument("--seeds", type=positive(int), default=3, help="trainings of each layer (default: %(default)s)")
    demo.add_argument(
        "--epochs", type=positive(int), help="default: 30 on JapaneseVowels; on PLAID 15 on a GPU, 3 on a CPU"
    )
    demo.add_argument(
        "--long",
        action="store_true",
        help="PLAID's long recordings too (pip install 'gpu-rnn[long]'); on a GPU the default",
    )
    demo.add_argument("--quick", action="store_true", help="one seed, three epochs, rough timing: does it run at all?")
    demo.add_argument("--out", type=Path, default=Path("gpu-rnn-demo.png"), help="the picture (default: %(default)s)")
    demo.set_defaults(command=_demo, parser=demo)


def _add_bench(commands: argparse._SubParsersAction) -> None:
    bench = commands.add_parser(
        "bench",
        help="time layers beside torch.nn on this device",
        description="Times the demo's layers on its recordings, and no training. Every backend, size and option is "
        "what a checkout's benchmarks time: python benchmarks/run.py --quick.",
    )
    bench.add_argument("--device", help=DEVICE_HELP)
    bench.add_argument("--long", action="store_true", help="on PLAID's long recordings (pip install 'gpu-rnn[long]')")
    bench.add_argument(
        "--seconds", type=positive(float), default=2.0, help="for each line and direction (default: %(default)s)"
    )
    bench.set_defaults(command=_bench, parser=bench)


def _add_explain(commands: argparse._SubParsersAction) -> None:
    explain = commands.add_parser(
        "explain",
        help="which backend would run a layer, and why not the others",
        description="Prints, for a layer described by its sizes, each backend's verdict, its reasons and its "
        "predicted time.",
        epilog="examples:\n"
        "  gpu-rnn explain --cell lstm --hidden 512 --batch 64 --steps 100 --dtype bf16 --device H100\n"
        "  gpu-rnn explain --cell gru --hidden 100 --reset-before --recurrent-activation hard_sigmoid",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_description(explain)
    explain.add_argument(
        "--device", metavar="NAME", help="one you need not have: H100, A100, RTX 4090 (default: this one)"
    )
    explain.set_defaults(command=_explain, parser=explain)


def _add_tune(commands: argparse._SubParsersAction) -> None:
    tune = commands.add_parser(
        "tune",
        help="measure every backend on a layer here, and have the fastest chosen from then on",
        description="Measures, for a layer described by its sizes, every backend that can run it on this device, "
        "and keeps the choice in the cache folder (GPU_RNN_CACHE), where every process on this machine finds it.",
        epilog="examples:\n  gpu-rnn tune --cell lstm --hidden 512 --batch 64 --steps 100 --dtype bf16 --inference",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_description(tune)
    tune.add_argument(
        "--seconds",
        type=positive(float),
        default=2.0,
        help="for each kind of call, about (default: %(default)s)",
    )
    tune.add_argument("--device", help=DEVICE_HELP)
    tune.set_defaults(command=_tune, parser=tune)


def _add_convert(commands: argparse._SubParsersAction) -> None:
    convert = commands.add_parser(
        "convert",
        help="what gpu_rnn.convert would replace in a model, and what it would leave and why",
        description="Reads a model that torch.save wrote, or a Python source, and says what gpu_rnn.convert(model) "
        "would do with it. Nothing is written: convert where the model is made. A source is read, not run.",
        epilog="examples:\n  gpu-rnn convert --dry-run model.py\n  gpu-rnn convert --dry-run --trust model.pt",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    convert.add_argument("file", metavar="FILE", type=Path, help="what torch.save wrote, or a .py file")
    convert.add_argument("--dry-run", action="store_true", required=True, help="say what would be done")
    convert.add_argument(
        "--trust", action="store_true", help="load a whole model, which runs the code that the file names"
    )
    convert.set_defaults(command=_convert, parser=convert)


def _add_description(command: argparse.ArgumentParser) -> None:
    """The options that describe a layer and its input."""
    command.add_argument("--cell", choices=("lstm", "gru", "rnn"), default="lstm", help="(default: %(default)s)")
    command.add_argument("--hidden", type=positive(int), required=True, metavar="H", help="units")
    command.add_argument("--input", type=positive(int), metavar="I", help="input features (default: as hidden)")
    command.add_argument("--batch", type=positive(int), default=32, metavar="B", help="(default: %(default)s)")
    command.add_argument("--steps", type=positive(int), default=100, metavar="T", help="(default: %(default)s)")
    command.add_argument("--layers", type=positive(int), default=1, metavar="L", help="(default: %(default)s)")
    command.add_argument("--bidirectional", action="store_true", help="both directions of time")
    command.add_argument("--proj", type=positive(int), metavar="P", help="proj_size, LSTM only")
    command.add_argument("--heads", type=positive(int), metavar="K", help="blocks on the diagonal of W_hh")
    command.add_argument("--dtype", choices=tuple(DTYPE_NAMES), default="fp32", help="(default: %(default)s)")
    command.add_argument("--activation", metavar="NAME", help="such as relu or softsign")
    command.add_argument("--recurrent-activation", metavar="NAME", help="such as hard_sigmoid")
    command.add_argument("--reset-before", action="store_true", help="GRU with the reset gate before the product")
    command.add_argument("--peephole", action="store_true", help="LSTM with peepholes")
    command.add_argument("--clip", type=positive(float), metavar="X", help="cuts what enters the activations to ±X")
    command.add_argument(
        "--zoneout", type=float, metavar="P", help="probability that a unit keeps its state for a step"
    )
    command.add_argument(
        "--recurrent-dropout", type=float, metavar="P", help="probability of dropping a unit of h before its product"
    )
    command.add_argument("--save", choices=("gates", "states"), help="for the backward pass (default: gates)")
    command.add_argument("--layer-norm", action="store_true", help="products normalised over the units of a gate")
    command.add_argument("--rms-norm", action="store_true", help="likewise, by their root mean square")
    passes = command.add_mutually_exclusive_group()
    passes.add_argument("--training", action="store_true", default=True, help="forward and backward (default)")
    passes.add_argument("--inference", dest="training", action="store_false", help="forward alone, without gradients")


def positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    """What makes a number of an argument, and refuses what is none or not more than 0."""

    def number(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"must be {what}, not {text!r}") from None
        if not value > 0:
            raise argparse.ArgumentTypeError(f"must be more than 0, not {text}")
        if value > INT64_MAX:
            raise argparse.ArgumentTypeError(f"must be less than 2^63, not {text}")
        return value

    return number
