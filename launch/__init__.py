"""The doors: flags, work directories, progress, figures and reports; no maths."""

import os

# XLA's C++ log: JAX reads this when it is first imported, whichever module of launch does so.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
