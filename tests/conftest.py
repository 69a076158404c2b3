"""Settings of the whole suite."""

from hypothesis import settings

# jit compiles on an example's first call, so an example's time says nothing.
settings.register_profile("suite", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("suite")
