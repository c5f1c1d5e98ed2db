"""Which torch is needed: an older one is refused here, before the modules that use it fail in their various ways."""

import re

import torch

# The first with torch.amp.GradScaler, which optimizer.py makes wait for reduced gradients. Everything else that the
# package uses of torch is older: register_post_accumulate_grad_hook, dtype.itemsize and torch.compiler came with 2.1.
OLDEST = (2, 3)

# By these two numbers alone: vendors' builds call 2.3 "2.3.0a0+6ddf5cf", which version comparisons count as older.
_found = re.match(r"(\d+)\.(\d+)", torch.__version__)
if _found is not None and (int(_found[1]), int(_found[2])) < OLDEST:
    raise ImportError(
        f"collective.torch needs torch {OLDEST[0]}.{OLDEST[1]} or later, and this is {torch.__version__}, from "
        f"{torch.__file__}"
    )
