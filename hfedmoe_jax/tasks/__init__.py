"""What clients learn: tasks by name."""

from hfedmoe_jax.tasks.classification import classification
from hfedmoe_jax.tasks.language_modeling import language_modeling
from hfedmoe_jax.tasks.multiple_choice import multiple_choice
from hfedmoe_jax.tasks.task import NO_DOCUMENTS, Batch, DocumentScores, Ratio, Task, tasks
from hfedmoe_jax.tasks.text_to_text import text_to_text

__all__ = [
    "NO_DOCUMENTS",
    "Batch",
    "DocumentScores",
    "Ratio",
    "Task",
    "classification",
    "language_modeling",
    "multiple_choice",
    "tasks",
    "text_to_text",
]
