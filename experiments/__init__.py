"""Measuring: quality, speed and memory of models and caches."""
