from __future__ import annotations

import torch

# two threads that wait for each other on a busy machine take ten times as long as one, and bits differ by machine
torch.set_num_threads(1)
