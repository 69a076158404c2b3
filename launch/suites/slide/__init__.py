"""The suite `slide`: solvers and latency kernels compared with NumPy and HiGHS."""
