"""What the three scripts share: one room for each step of the data flow."""

import os

# NumPy multiplies the small matrices of rl/fast/policy.py: with one thread, so that processes do not fight for cores.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
