"""What clients learn: tasks by name."""

from hfedmoe_jax.tasks.classification import classification
from hfedmoe_jax.tasks.task import Batch, Ratio, Task, tasks

__all__ = ["Batch", "Ratio", "Task", "classification", "tasks"]
