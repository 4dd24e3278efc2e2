"""Recipes that run a benchmark end to end: `python -m gradsurgery.recipes.<name>`."""
