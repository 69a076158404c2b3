"""A new solver for SLIDE: users who accept the least accuracy are admitted first.

python -m launch.main --config=examples/solver.py
"""

import jax.numpy as jnp

from configs import slide
from slide_jax import SOLVERS, pure_solver
from slide_jax.baselines import serve_in_order


def decide(hull, problem):
    """A pure function of arrays: a problem and the convex hull of its models in, an allocation out."""
    return serve_in_order(hull, problem, jnp.argsort(problem.users.min_accuracy))


SOLVERS["undemanding_first"] = pure_solver(decide, label="SLIDE, undemanding users first")


def get_config(preset: str = "default"):
    return slide.get_config(preset)
