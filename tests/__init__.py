import os

import torch

if not torch.cuda.is_available():
    # Triton reads this when it is imported, which others do on the way.
    os.environ.setdefault("TRITON_INTERPRET", "1")
