"""Simultaneous model downloading and inference (SLIDE, arXiv 2512.20946)."""
