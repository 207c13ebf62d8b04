"""Functions on pixels that Numba compiles."""

import resource

import numpy as np

from spvit_jax.data.compiled import compiled


def test_code_that_a_full_disk_cannot_keep_runs_all_the_same():
    @compiled
    def twice(x):
        return 2 * x

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        result = twice(np.arange(3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert result.tolist() == [0, 2, 4]
