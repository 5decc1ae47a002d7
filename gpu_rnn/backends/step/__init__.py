# SPDX-License-Identifier: Apache-2.0
"""One product and one pointwise pass a step: every recurrence, every option, any device.

What no other backend takes runs here. So it has no limits of size, and takes each option as soon as the reference
does. In torch it is two loops (torch_forward, torch_backward), on a GPU a product and a generated kernel a stage over
fixed buffers (gpu, gpu_buffers), which CUDA graphs replay (cuda_graphs).
"""
