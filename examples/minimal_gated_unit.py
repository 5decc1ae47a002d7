# SPDX-License-Identifier: Apache-2.0
"""A recurrent cell of one's own: a minimal gated unit (Zhou et al., arXiv:1603.09420) learns to add two marked numbers.

The cell is written once, as a function of scalars. Stacks, both directions, packed input, every backend, derivatives,
torch.compile and torch.export come with it.

    python examples/minimal_gated_unit.py
"""

import argparse

import torch

import gpu_rnn


def minimal_gated_unit(sharpness: float = 1.0) -> gpu_rnn.Recurrence:
    """f = σ(sharpness · (x_f + r_f)); h' = (1 − f) h + f tanh(x_n + f r_n)."""

    def step(x, r, s):
        f = torch.sigmoid(sharpness * (x.f + r.f))
        n = torch.tanh(x.n + f * r.n)
        return (1 - f) * s.h + f * n

    return gpu_rnn.Recurrence(step, gates=("f", "n"), states=("h",), name="minimal_gated_unit")


class Adder(torch.nn.Module):
    """Reads numbers, two of which are marked, and gives the sum of the two (Hochreiter & Schmidhuber, 1997)."""

    def __init__(self, hidden_size: int = 32) -> None:
        super().__init__()
        self.rnn = gpu_rnn.Recurrent(minimal_gated_unit(), input_size=2, hidden_size=hidden_size)
        self.head = torch.nn.Linear(hidden_size, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(x)[0][-1]).squeeze(-1)


def draw(steps: int, batch: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(T, B, 2) numbers beside their marks, and (B,) the sums of the marked ones."""
    numbers = torch.rand(steps, batch, device=device)
    half = steps // 2
    first = torch.randint(half, (batch,), device=device)
    second = torch.randint(half, steps, (batch,), device=device)
    marks = torch.nn.functional.one_hot(torch.stack([first, second]), steps).sum(0).T.to(numbers.dtype)
    return torch.stack([numbers, marks], -1), (numbers * marks).sum(0)


def train(updates: int, steps: int = 10, batch: int = 64, log: bool = True) -> float:
    """The mean squared error over the last tenth of the updates; always answering 1 gives 0.167."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Adder().to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    errors = []
    for update in range(updates):
        x, total = draw(steps, batch, device)
        loss = torch.nn.functional.mse_loss(model(x), total)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(loss.item())
        if log and update % 50 == 0:
            print(f"update {update:4}  error {loss.item():.4f}")
    last = errors[-max(updates // 10, 1) :]
    return sum(last) / len(last)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--updates", type=int, default=300)
    arguments = parser.parse_args()
    error = train(arguments.updates)
    print(f"error {error:.4f} (always answering 1 gives 0.1667)")
    print(minimal_gated_unit().source("triton"))
