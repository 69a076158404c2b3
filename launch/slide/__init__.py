"""The SLIDE experiment: what one run does, its sweeps, its figures and its report."""
