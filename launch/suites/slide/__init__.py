"""The suite `slide`: solvers and latency kernels beside NumPy and HiGHS."""
