# SPDX-License-Identifier: Apache-2.0
"""A block-diagonal GRU with normalised products, after the recurrent core of Dreamer V3, learns where it is on a ring.

The gates are those of Dreamer V3 (Hafner et al., arXiv:2301.04104; `_core` of its rssm.py): reset before tanh, of the
whole candidate, and an update gate that starts at σ(−1). There two block-diagonal layers make the gates of h, and what
is between them is divided by the root mean square of all units; here it is one, whose products are normalised gate by
gate and head by head, so that all heads run side by side in one launch.

    python examples/block_gru.py
"""

import argparse

import torch

import gpu_rnn

PLACES = 8


def block_gru() -> gpu_rnn.Recurrence:
    """h' = u c + (1 − u) h, with c = tanh(σ(r) (x_c + r_c)) and u = σ(x_u + r_u − 1)."""

    def step(x, r, s):
        reset, update = torch.sigmoid(x.r + r.r), torch.sigmoid(x.u + r.u - 1)
        candidate = torch.tanh(reset * (x.c + r.c))
        return update * candidate + (1 - update) * s.h

    return gpu_rnn.Recurrence(step, gates=("r", "c", "u"), states=("h",), name="block_gru")


class WorldModel(torch.nn.Module):
    """Says at each step where on the ring it is; x is (T, B, 1 + PLACES), resets are where episodes begin."""

    def __init__(self, hidden_size: int = 128, heads: int = 4) -> None:
        super().__init__()
        self.core = gpu_rnn.Recurrent(block_gru(), 1 + PLACES, hidden_size, heads=heads, rms_norm=True)
        self.place = torch.nn.Linear(hidden_size, PLACES)

    def forward(self, x: torch.Tensor, resets: torch.Tensor) -> torch.Tensor:
        return self.place(self.core(x, resets=resets)[0])


def draw(steps: int, batch: int, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x: moves of −1, 0 or 1 beside the place, which is shown where an episode begins and nowhere else; where that is;
    the places (T, B)."""
    moves = torch.randint(-1, 2, (steps, batch), device=device)
    begins = torch.rand(steps, batch, device=device) < 0.1
    begins[0] = True
    starts, place, places = torch.randint(PLACES, (steps, batch), device=device), torch.zeros_like(moves[0]), []
    for move, begin, start in zip(moves, begins, starts, strict=True):
        place = torch.where(begin, start, (place + move) % PLACES)
        places.append(place)
    shown = torch.nn.functional.one_hot(starts, PLACES) * begins[..., None]
    x = torch.cat([(moves * ~begins)[..., None], shown], -1).float()
    return x, begins, torch.stack(places)


def train(updates: int, steps: int = 24, batch: int = 32, log: bool = True) -> float:
    """The share of right answers over the last tenth of the updates; guessing gives 1/8."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = WorldModel().to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
    right = []
    for update in range(updates):
        x, begins, places = draw(steps, batch, device)
        answers = model(x, begins)
        loss = torch.nn.functional.cross_entropy(answers.flatten(0, 1), places.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        right.append((answers.argmax(-1) == places).float().mean().item())
        if log and update % 50 == 0:
            print(f"update {update:4}  right {right[-1]:.3f}")
    last = right[-max(updates // 10, 1) :]
    return sum(last) / len(last)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--updates", type=int, default=300)
    arguments = parser.parse_args()
    print(f"right {train(arguments.updates):.3f} (guessing gives 0.125)")
