"""Metrics, generation scoring and analysis."""
