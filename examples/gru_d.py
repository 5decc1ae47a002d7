# SPDX-License-Identifier: Apache-2.0
"""GRU-D, a published cell for series with missing values (Che et al., Scientific Reports 8:6085, arXiv:1606.01865).

Three vital signs drift back to their means, each at its own pace. They are measured with noise, at irregular times,
and rarely all at once. GRU-D estimates all three at every visit. docs/gru_d.md derives the cell, step by step.

    python examples/gru_d.py    # trains for seconds, prints the errors, draws gru_d.png (needs gpu-rnn[demo])
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import gpu_rnn


def reset_and_update(x: Any, r: Any, s: Any) -> Any:
    """The first stage: r ⊙ ĥ enters the second product, z goes on to the second stage."""
    return torch.sigmoid(x.r + r.r) * s.decayed, torch.sigmoid(x.z + r.z)


def candidate_and_decay(x: Any, r: Any, s: Any, p: Any, values: Any) -> Any:
    """The second stage: h, and before it ĥ, which is h decayed for the step to come."""
    (z,) = values
    h = (1 - z) * s.decayed + z * torch.tanh(x.n + r.n)
    return torch.exp(-torch.relu(x.decay)) * h, h


# The first state is what enters the products: it is ĥ, not h.
CELL = gpu_rnn.Recurrence(
    [(("r", "z"), reset_and_update), (("n", "decay"), candidate_and_decay)], states=("decayed", "h"), name="gru_d"
)


class Series(NamedTuple):
    """Series of T steps, seen through a mask."""

    times: Tensor  # (T, B), ascending
    values: Tensor  # (T, B, D); what stands where nothing was observed is never read
    observed: Tensor  # (T, B, D) bool


def gaps(series: Series) -> tuple[Tensor, Tensor]:
    """δ, the time since each variable was last observed before a step, and x', what was observed then.

    Returns:
        Two tensors (T, B, D). Where nothing was observed before, δ counts from the first step, and x' is 0.
    """
    steps = torch.arange(len(series.times), device=series.times.device)[:, None, None]
    latest = torch.where(series.observed, steps, -1).cummax(0).values  # of the steps up to this one
    before = torch.cat([torch.full_like(latest[:1], -1), latest[:-1]])
    since = series.times[:, :, None].expand_as(series.values).gather(0, before.clamp(min=0))
    last = torch.where(before >= 0, series.values.gather(0, before.clamp(min=0)), 0)
    return series.times[:, :, None] - since, last


class Blocks(nn.Module):
    """The parts of W_ih that the formulas have: r, z and n see x̂ and m; the decay sees δ alone."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        blocks = torch.tensor([[1, 1, 0]] * 3 + [[0, 0, 1]])
        self.register_buffer("blocks", blocks.repeat_interleave(hidden, 0).repeat_interleave(inputs, 1))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.blocks


class GRUD(nn.Module):
    """GRU-D for D variables.

    Args:
        inputs: D.
        hidden: units, H.
        means: (D), x̃, what a variable decays to. Default: 0
    """

    def __init__(self, inputs: int, hidden: int, means: Tensor | None = None) -> None:
        super().__init__()
        self.rnn = gpu_rnn.Recurrent(CELL, 3 * inputs, hidden)
        parametrize.register_parametrization(self.rnn, "weight_ih_l0", Blocks(inputs, hidden))
        self.weight_decay = nn.Parameter(torch.full((inputs,), 0.1))  # W_γx, which the paper keeps diagonal
        self.bias_decay = nn.Parameter(torch.zeros(inputs))
        self.register_buffer("means", torch.zeros(inputs) if means is None else means)

    def input_decay(self, delta: Tensor) -> Tensor:
        """γ_x, of the shape of δ."""
        return torch.exp(-torch.relu(self.weight_decay * delta + self.bias_decay))

    def hidden_decay(self, delta: Tensor) -> Tensor:
        """γ_h for δ (B, D): (B, H). Inside of a series the cell computes it."""
        *_, weight = self.rnn.weight_ih_l0.chunk(4)
        *_, bias = self.rnn.bias_ih_l0.chunk(4)
        return torch.exp(-torch.relu(delta @ weight[:, -delta.shape[-1] :].T + bias))

    def forward(self, series: Series, h: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """h after every step, (T, B, H), and after the last, (B, H); `h` before the first, (B, H), is 0 by default."""
        delta, last = gaps(series)
        decay = self.input_decay(delta)
        filled = torch.where(series.observed, series.values, decay * last + (1 - decay) * self.means)  # x̂
        following = torch.cat([delta[1:], torch.zeros_like(delta[:1])])  # after the last step nobody reads ĥ
        states = None
        if h is not None:
            states = ((self.hidden_decay(delta[0]) * h)[None], h[None])
        inputs = torch.cat([filled, series.observed.to(filled), following], -1)
        _, (_, final), (_, every) = self.rnn(inputs, states, return_all_states=True)
        return every[:, 0], final[0]


PACES = (1.0, 4.0, 16.0)  # hours in which a vital sign forgets: its correlation falls to 1/e
NOISE = 0.5  # standard deviation of a measurement; a vital sign's own is 1
SHARE = 0.35  # of the variables, measured at a visit


def draw(steps: int, batch: int, generator: torch.Generator) -> tuple[Series, Tensor]:
    """Visits an hour apart on average, and the vital signs (T, B, D) themselves: Ornstein-Uhlenbeck processes."""
    hours = torch.empty(steps, batch).exponential_(generator=generator)
    shape = (steps, batch, len(PACES))
    kept = torch.exp(-hours[:, :, None] / torch.tensor(PACES))
    fresh = torch.randn(shape, generator=generator) * (1 - kept**2).sqrt()
    truth = [torch.randn(shape[1:], generator=generator)]
    for t in range(1, steps):
        truth.append(kept[t] * truth[-1] + fresh[t])
    signs = torch.stack(truth)
    measured = signs + NOISE * torch.randn(shape, generator=generator)
    observed = torch.rand(shape, generator=generator) < SHARE
    return Series(hours.cumsum(0), torch.where(observed, measured, torch.nan), observed), signs


def kalman(series: Series) -> Tensor:
    """(T, B, D): the best that can be known after each visit, by a filter that is told the paces and the noise."""
    hours = series.times.diff(dim=0, prepend=series.times[:1])[:, :, None]
    mean, variance, means = torch.zeros_like(series.values[0]), torch.ones_like(series.values[0]), []
    for kept, values, observed in zip(torch.exp(-hours / torch.tensor(PACES)), *series[1:], strict=True):
        mean, variance = kept * mean, kept**2 * variance + 1 - kept**2
        gain = torch.where(observed, variance / (variance + NOISE**2), 0)
        mean, variance = mean + gain * torch.where(observed, values - mean, 0), (1 - gain) * variance
        means.append(mean)
    return torch.stack(means)


def carried_forward(series: Series) -> Tensor:
    """(T, B, D): each variable as last measured."""
    return torch.where(series.observed, series.values, gaps(series)[1])


class Estimator(nn.Module):
    """GRU-D, and a linear map from h to the vital signs."""

    def __init__(self, hidden: int = 32) -> None:
        super().__init__()
        self.gru_d = GRUD(len(PACES), hidden)
        self.head = nn.Linear(hidden, len(PACES))

    def forward(self, series: Series) -> Tensor:
        return self.head(self.gru_d(series)[0])


def train(updates: int, steps: int = 50, batch: int = 64) -> Estimator:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = Estimator()
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=updates)
    for update in range(updates):
        series, signs = draw(steps, batch, generator)
        loss = nn.functional.mse_loss(model(series), signs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if update % 50 == 0:
            print(f"update {update:4}  error {loss.sqrt().item():.3f}", flush=True)
    return model


def errors(model: Estimator, series: Series, signs: Tensor) -> dict[str, Tensor]:
    """The root mean square error of each vital sign, (D)."""
    estimates = {"carried forward": carried_forward(series), "GRU-D": model(series), "best possible": kalman(series)}
    return {name: (estimate - signs).square().mean((0, 1)).sqrt() for name, estimate in estimates.items()}


COLOURS = ("#0072B2", "#D55E00", "#009E73")  # of Okabe and Ito's palette, which colour-blind readers can tell apart


def picture(model: Estimator, series: Series, signs: Tensor, path: Path) -> None:
    """Draws the first of the series, what the decays have learnt, and the errors."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7), dpi=90, layout="constrained")
    axes = figure.subplot_mosaic(
        [["sign 0", "input"], ["sign 1", "hidden"], ["sign 2", "errors"]], width_ratios=(2.2, 1)
    )
    times, estimate, forward = series.times[:, 0], model(series)[:, 0], carried_forward(series)[:, 0]
    for d, pace in enumerate(PACES):
        sign, seen = axes[f"sign {d}"], series.observed[:, 0, d]
        sign.plot(times, signs[:, 0, d], color="0.45", lw=1, label="vital sign")
        sign.step(times, forward[:, d], where="post", color="0.75", lw=1, ls=":", label="carried forward")
        sign.plot(times[seen], series.values[seen, 0, d], "o", color="black", ms=4, label="measured")
        sign.plot(times, estimate[:, d], color=COLOURS[d], lw=2, label="GRU-D")
        sign.set(ylabel=f"pace {pace:g} h", xlim=(0, float(times[-1])))
    axes["sign 0"].set_title("Three vital signs of a patient, each measured at a third of the visits")
    axes["sign 0"].legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=4, fontsize=9, frameon=False)
    axes["sign 2"].set_xlabel("hours")

    hours = torch.linspace(0, 24, 100)[:, None].expand(-1, len(PACES))
    gamma = model.gru_d.input_decay(hours)
    for d, pace in enumerate(PACES):
        axes["input"].plot(hours[:, 0], gamma[:, d], color=COLOURS[d], lw=2, label=f"pace {pace:g} h")
        axes["input"].plot(hours[:, 0], torch.exp(-hours[:, 0] / pace), color=COLOURS[d], lw=1, ls="--")
    axes["input"].set(title="Input decay, learnt (dashed: of the signs)", ylim=(0, 1.05), ylabel="$\\gamma_x$")
    axes["input"].legend(fontsize=8, frameon=False)
    axes["hidden"].plot(hours[:, 0], model.gru_d.hidden_decay(hours), color="0.3", lw=0.8, alpha=0.6)
    axes["hidden"].set(title="Hidden decay of each unit, learnt", ylim=(0, 1.05), ylabel="$\\gamma_h$")
    axes["hidden"].set_xlabel("hours without a measurement")
    shades, bars = ("0.75", COLOURS[0], "0.3"), errors(model, series, signs)
    for place, ((name, values), shade) in enumerate(zip(bars.items(), shades, strict=True)):
        at = [d + (place - 1) * 0.27 for d in range(len(PACES))]
        axes["errors"].bar(at, values.tolist(), 0.25, color=shade, label=name)
    axes["errors"].set(title="Error on new patients", ylabel="root mean square")
    axes["errors"].set_xticks(range(len(PACES)), [f"pace {pace:g} h" for pace in PACES])
    axes["errors"].set_ylim(0, 1.45 * float(max(bars["carried forward"])))
    axes["errors"].legend(fontsize=8, frameon=False, ncols=3, loc="upper center", columnspacing=0.8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=300)
    parser.add_argument("--picture", type=Path, default=Path("gru_d.png"))
    arguments = parser.parse_args()
    model = train(arguments.updates)
    with torch.no_grad():
        series, signs = draw(60, 1000, torch.Generator().manual_seed(1))
        for name, values in errors(model, series, signs).items():
            print(f"{name:>16}", *(f"{value:.3f}" for value in values))
        picture(model, series, signs, arguments.picture)
    print("drawn to", arguments.picture)


if __name__ == "__main__":
    main()
