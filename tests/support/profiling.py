# SPDX-License-Identifier: Apache-2.0
"""What torch's profiler saw of a call."""

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def operations(call: Callable[[], object]) -> list[str]:
    """The operations that a call ran, by name and in order, those within others too."""
    # Without acc_events some releases warn that a second cycle would forget the first; there is one.
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as found:
        call()
    return [event.name for event in found.events()]
