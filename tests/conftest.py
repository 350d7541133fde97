"""What all tests share."""

import torch

torch.set_num_threads(1)  # as in the scripts: more threads would fight for the cores, and round differently
