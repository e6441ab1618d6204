"""Experiments: what a cache policy or a weight format costs in quality."""
