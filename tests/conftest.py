"""Small tensors everywhere: one thread a process is faster than many."""

import torch

torch.set_num_threads(1)
