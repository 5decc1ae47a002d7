# SPDX-License-Identifier: Apache-2.0
"""Who speaks, on 1 to 256 streams at once: Silero's voice activity detector, with its LSTM in `gpu_rnn.Streams`.

    pip install 'gpu-rnn[streaming]'
    python examples/streaming_vad.py                         # a synthetic recording on 1, 16 and 256 streams
    python examples/streaming_vad.py --wav speech.wav --streams 64

The weights are those that Silero releases in its package silero-vad (MIT licence): a spectrum, four convolutions, an
LSTM of 128 units and a sigmoid, for frames of 32 ms. Each stream joins in its own time, hears the recording from its
beginning and leaves at its end. Probabilities are held to those of ONNX Runtime on the same package's ONNX file, and
drawn over time.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import time
import warnings
import wave
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gpu_rnn

RATE, FRAME, CONTEXT = 16_000, 512, 64  # samples a second, of a frame, and of the one before that a frame sees again
BLOCK = RATE // 100  # samples of 10 ms
AGREES = 1e-5  # of ours with ONNX Runtime, in a probability


def released(file: str) -> Path:
    """Where the package silero-vad has a file. It is not imported: it would set torch's number of threads."""
    spec = importlib.util.find_spec("silero_vad")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("the released weights need silero-vad: pip install 'gpu-rnn[streaming]'")
    return Path(spec.origin).parent / "data" / file


class Detector(nn.Module):
    """Silero's network for 16 kHz."""

    def __init__(self) -> None:
        super().__init__()
        self.stft_conv = nn.Conv1d(1, 258, 256, stride=128, bias=False)  # a spectrum: 129 real and 129 imaginary parts
        sizes = [(129, 128, 1), (128, 64, 2), (64, 64, 2), (64, 128, 1)]
        self.encoder = nn.ModuleList(nn.Conv1d(n, m, 3, stride, padding=1) for n, m, stride in sizes)
        self.lstm = gpu_rnn.LSTM(128, 128)
        self.final_conv = nn.Conv1d(128, 1, 1)

    @classmethod
    def released(cls) -> Detector:
        """With the weights of the package silero-vad, out of its TorchScript file."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit
            script = torch.jit.load(str(released("silero_vad.jit")))._model
        weights = {name: tensor.detach() for name, tensor in script.state_dict().items()}
        detector = cls()
        detector.load_state_dict({cls.name_of(name): tensor for name, tensor in weights.items()})
        return detector.eval().requires_grad_(False)

    @staticmethod
    def name_of(name: str) -> str:
        """What a weight of Silero's is called here."""
        for theirs, mine in {
            "stft.forward_basis_buffer": "stft_conv.weight",
            ".reparam_conv.": ".",
            "decoder.decoder.2.": "final_conv.",
        }.items():
            name = name.replace(theirs, mine)
        return f"{name.replace('decoder.rnn.', 'lstm.')}_l0" if name.startswith("decoder.rnn.") else name

    def features(self, samples: Tensor) -> Tensor:
        """(B, CONTEXT + FRAME) -> (B, 128), what enters the LSTM."""
        x = self.stft_conv(F.pad(samples[:, None], (0, CONTEXT), "reflect"))
        x = torch.hypot(*x.chunk(2, 1))
        for convolution in self.encoder:
            x = F.relu(convolution(x))
        return x.squeeze(2)

    def probabilities(self, h: Tensor) -> Tensor:
        """(B, 128) -> (B)."""
        return torch.sigmoid(self.final_conv(F.relu(h)[:, :, None])).flatten()


class Listener:
    """The detector on many streams: of each the LSTM's states, and the last samples."""

    def __init__(self, detector: Detector) -> None:
        self.detector, self.streams = detector, gpu_rnn.Streams(detector.lstm)
        self.context: dict[int, Tensor] = {}

    def hear(self, frames: Mapping[int, Tensor]) -> Tensor:
        """A frame of each stream that has one, (FRAME) -> the probabilities of speech, in their order. Who was never
        heard joins."""
        new = [name for name in frames if name not in self.streams]
        self.streams.join(*new)
        self.context |= {name: frames[name].new_zeros(CONTEXT) for name in new}
        heard = torch.stack([torch.cat([self.context[name], frame]) for name, frame in frames.items()])
        self.context |= dict(zip(frames, heard[:, -CONTEXT:], strict=True))
        with torch.inference_mode():
            h = self.streams.step_batch(list(frames), self.detector.features(heard))
            return self.detector.probabilities(h)

    def leave(self, name: int) -> None:
        self.streams.leave(name)
        del self.context[name]


class OnnxRuntime:
    """The same network as silero-vad's ONNX file: one session for all, and of each stream its state."""

    def __init__(self) -> None:
        import onnxruntime

        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(
            str(released("silero_vad.onnx")), settings, ["CPUExecutionProvider"]
        )
        self.rate, self.states, self.context = torch.tensor(RATE).numpy(), {}, {}

    def hear(self, frames: Mapping[int, Tensor]) -> Tensor:
        """Stream after stream, as its package does it."""
        found = []
        for name, frame in frames.items():
            heard = torch.cat([self.context.get(name, frame.new_zeros(CONTEXT)), frame])
            state = self.states.get(name, torch.zeros(2, 1, 128).numpy())
            given = {"input": heard[None].numpy(), "state": state, "sr": self.rate}
            probability, self.states[name] = self.session.run(None, given)
            self.context[name] = heard[-CONTEXT:]
            found.append(float(probability[0, 0]))
        return torch.tensor(found)

    def leave(self, name: int) -> None:
        del self.states[name], self.context[name]


def resonance(x: Tensor, hertz: Tensor, width: float = 90.0) -> Tensor:
    """A formant: x filtered by two poles, whose frequency has a value for each block of 10 ms."""
    radius, last, before, filtered = math.exp(-math.pi * width / RATE), 0.0, 0.0, []
    turns = (2 * radius * torch.cos(2 * math.pi * hertz / RATE)).tolist()
    for n, value in enumerate(x.tolist()):
        last, before = (1 - radius) * value + turns[n // BLOCK] * last - radius * radius * before, last
        filtered.append(last)
    return torch.tensor(filtered, dtype=torch.float64)


def synthetic(seconds: float = 8.0) -> Tensor:
    """Something that speaks in turns of two seconds: a pulse train of a voice's pitch through three formants that move
    from vowel to vowel, in noise."""
    generator, count = torch.Generator().manual_seed(0), int(seconds * RATE)
    blocks, t = count // BLOCK + 1, torch.arange(count) / RATE
    pitch = 120 + 25 * torch.sin(2 * math.pi * 0.7 * t) + 8 * torch.sin(2 * math.pi * 3.1 * t)
    phase = torch.cumsum(pitch / RATE, 0, dtype=torch.float64)
    voice = (phase.floor().diff(prepend=phase[:1].floor()) > 0).double()
    voice += 0.02 * torch.randn(count, generator=generator, dtype=torch.float64)
    vowels = torch.tensor([[730, 1090, 2440], [270, 2290, 3010], [300, 870, 2240], [530, 1840, 2480]]).double()
    spoken = vowels[torch.randint(4, (blocks // 12 + 2,), generator=generator)].T[None]
    formants = F.interpolate(spoken, size=blocks, mode="linear", align_corners=True)[0]
    for formant in formants:
        voice = voice + 8 * resonance(voice, formant)
    syllables = (0.5 - 0.5 * torch.cos(2 * math.pi * 4.2 * t)).double() ** 0.7
    talking = ((t / 2).long() % 2 == 1).double()
    voice = voice * syllables * talking
    noise = torch.randn(count, generator=generator, dtype=torch.float64)
    return (0.25 * voice / voice.abs().max() + 0.001 * noise).float()


def recording(file: Path) -> Tensor:
    """A WAV file with 16 bits a sample as one channel of 16 kHz, between -1 and 1."""
    with wave.open(str(file)) as sound:
        if sound.getsampwidth() != 2:
            raise ValueError(f"{file} has {8 * sound.getsampwidth()} bits a sample: 16 are read here")
        data = torch.frombuffer(bytearray(sound.readframes(sound.getnframes())), dtype=torch.int16)
        mono = data.view(-1, sound.getnchannels()).float().mean(1) / 32768
        length = round(len(mono) * RATE / sound.getframerate())
    return F.interpolate(mono[None, None], size=length, mode="linear", align_corners=False)[0, 0]


def listen(samples: Tensor, count: int, listener: Listener | OnnxRuntime) -> tuple[Tensor, list[float]]:
    """`count` streams over a recording, which begin one after the other in the first half of its time: (count, frames)
    probabilities, and the seconds of each tick."""
    frames = samples[: len(samples) // FRAME * FRAME].view(-1, FRAME)
    probabilities, seconds = torch.full((count, len(frames)), torch.nan), []
    begins = [name * (len(frames) // 2) // max(count, 1) for name in range(count)]
    for tick in range(len(frames) + max(begins)):
        places = {name: tick - begin for name, begin in enumerate(begins) if 0 <= tick - begin < len(frames)}
        start = time.perf_counter()
        heard = listener.hear({name: frames[place] for name, place in places.items()})
        seconds.append(time.perf_counter() - start)
        for (name, place), probability in zip(places.items(), heard.tolist(), strict=True):
            probabilities[name, place] = probability
            if place == len(frames) - 1:
                listener.leave(name)
    return probabilities, seconds


def compare(samples: Tensor, counts: list[int], say: Callable[[str], None] = print) -> Tensor:
    """Both on so many streams: the probabilities of the last count, and a line for each."""
    for count in counts:
        ours, mine = listen(samples, count, Listener(Detector.released()))
        theirs, their_seconds = listen(samples, count, OnnxRuntime())
        off = float((ours - theirs).abs().max())
        assert off < AGREES, f"ONNX Runtime's probabilities are others: {off:.1e}"
        tick, their_tick = (1000 * sorted(each)[len(each) // 2] for each in (mine, their_seconds))
        say(
            f"{count:4} streams: {tick:7.2f} ms for a frame of 32 ms, ONNX Runtime one by one {their_tick:7.2f} ms; "
            f"largest difference {off:.1e}"
        )
    return ours


def picture(samples: Tensor, probabilities: Tensor, file: Path) -> None:
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, sharex=True, figsize=(9, 4), layout="constrained")
    above.plot(torch.arange(len(samples)) / RATE, samples, linewidth=0.3)
    above.set_ylabel("recording")
    below.plot(torch.arange(probabilities.shape[1]) * FRAME / RATE, probabilities[0])
    below.set(ylabel="probability of speech", xlabel="seconds", ylim=(0, 1))
    figure.savefig(file)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="Silero's voice activity detector on many streams at once.")
    parser.add_argument("--wav", type=Path, help="a recording of 16 bits a sample (default: a synthetic one)")
    parser.add_argument("--streams", default="1,16,256", help="how many, with commas between (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("speech.png"), help="the picture (default: %(default)s)")
    options = parser.parse_args()
    samples = synthetic() if options.wav is None else recording(options.wav)
    probabilities = compare(samples, [int(count) for count in options.streams.split(",")])
    picture(samples, probabilities, options.out)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
