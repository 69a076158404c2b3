"""Parts that every run shares: work directory, checkpoints, metrics, progress, figures and report."""
