# SPDX-License-Identifier: Apache-2.0
"""Recurrent reinforcement learning: a policy must remember within an episode, and forget between two.

In each episode a light shines at one step or not at all, and nothing tells where an episode ends. At every step the
agent says whether it has seen the light in this episode; reward 1 if it is right. Rollouts of many short episodes are
one batch: `resets` marks where episodes begin. Without it, the memory of one episode leaks into the next.

    python examples/memory_policy.py
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

import gpu_rnn


class Rollout:
    """Observations (T, B, 2) of light and noise, the right answers (T, B) and the steps (T, B) where episodes begin."""

    def __init__(self, steps: int, batch: int, generator: torch.Generator) -> None:
        self.starts = torch.rand(steps, batch, generator=generator) < 1 / 6
        self.starts[0] = True
        light = torch.rand(steps, batch, generator=generator) < 0.1
        self.observations = torch.stack([light.float(), torch.rand(steps, batch, generator=generator)], -1)
        seen, answers = torch.zeros(batch, dtype=torch.bool), []
        for begins, shines in zip(self.starts, light, strict=True):
            seen = (seen & ~begins) | shines
            answers.append(seen)
        self.answers = torch.stack(answers)


class Policy(torch.nn.Module):
    """A GRU and the logits of the two answers."""

    def __init__(self, hidden_size: int = 16) -> None:
        super().__init__()
        self.memory = gpu_rnn.GRU(2, hidden_size)
        self.logits = torch.nn.Linear(hidden_size, 2)

    def forward(self, observations: Tensor, resets: Tensor | None) -> torch.distributions.Categorical:
        h, _ = self.memory(observations, resets=resets)
        return torch.distributions.Categorical(logits=self.logits(h))


def train(updates: int, use_resets: bool, seed: int = 0) -> float:
    """The share of right answers after training by REINFORCE (Williams, 1992)."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    policy = Policy()
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
    for _ in range(updates):
        rollout = Rollout(48, 64, generator)
        answers = policy(rollout.observations, rollout.starts if use_resets else None)
        said = answers.sample()
        reward = (said == rollout.answers).float()
        loss = -(answers.log_prob(said) * (reward - reward.mean())).mean() - 0.01 * answers.entropy().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        rollout = Rollout(200, 256, generator)
        best = policy(rollout.observations, rollout.starts if use_resets else None).probs.argmax(-1)
    return (best == rollout.answers).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=200)
    updates = parser.parse_args().updates
    print(f"{updates} updates of 64 rollouts of 48 steps; right answers on new episodes:")
    for use_resets in (True, False):
        right = train(updates, use_resets)
        print(f"{'with' if use_resets else 'without'} resets {right:.1%}".rjust(24), flush=True)


if __name__ == "__main__":
    main()
