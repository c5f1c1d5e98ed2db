"""What benchmarks use of CuPy's second package: page-locked memory, which is plain memory here."""

import numpy as np

empty_pinned = np.empty
