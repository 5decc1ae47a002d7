# SPDX-License-Identifier: Apache-2.0
"""The episode masks of two reinforcement learning libraries as `resets`: one call in the place of a loop over steps.

Stable-Baselines3's recurrent policies and TorchRL's recurrent modules run a sequence step by step, or split it,
wherever an episode begins inside of it. Neither library is needed here: the functions take what they hand over.

    python examples/episodes.py
"""

from __future__ import annotations

import torch
from torch import Tensor

import gpu_rnn

States = tuple[Tensor, Tensor]


def process_sequence(
    features: Tensor, lstm_states: States, episode_starts: Tensor, lstm: gpu_rnn.LSTM
) -> tuple[Tensor, States]:
    """For `RecurrentActorCriticPolicy._process_sequence` of Stable-Baselines3's contributions (sb3_contrib).

    Args:
        features: (sequences * steps, features), sequence after sequence.
        lstm_states: h and c, (num_layers, sequences, hidden_size).
        episode_starts: (sequences * steps) floats, 1 where an episode begins.
        lstm: the policy's, without batch_first.

    Returns:
        The outputs, (sequences * steps, hidden_size), and the final states.
    """
    sequences = lstm_states[0].shape[1]
    x = features.unflatten(0, (sequences, -1)).transpose(0, 1)
    resets = episode_starts.unflatten(0, (sequences, -1)).transpose(0, 1).bool()
    output, states = lstm(x, lstm_states, resets=resets)
    return output.transpose(0, 1).flatten(0, 1), states


def lstm_module(observation: Tensor, is_init: Tensor, lstm: gpu_rnn.LSTM) -> Tensor:
    """For the recurrent mode of TorchRL's `LSTMModule`.

    Args:
        observation: (B, T, features).
        is_init: (B, T, 1) bool, True where an episode begins.
        lstm: with batch_first=True.

    Returns:
        (B, T, hidden_size).
    """
    output, _ = lstm(observation, resets=is_init.squeeze(-1))
    return output


def main() -> None:
    torch.manual_seed(0)
    lstm = gpu_rnn.LSTM(3, 5)
    states = (torch.randn(1, 2, 5), torch.randn(1, 2, 5))
    starts = torch.tensor([0.0, 0, 1, 0, 1, 0, 0, 0])
    output, _ = process_sequence(torch.randn(8, 3), states, starts, lstm)
    print("Stable-Baselines3: outputs", tuple(output.shape))
    module = gpu_rnn.LSTM(3, 5, batch_first=True)
    print("TorchRL: outputs", tuple(lstm_module(torch.randn(2, 4, 3), starts.view(2, 4, 1).bool(), module).shape))


if __name__ == "__main__":
    main()
