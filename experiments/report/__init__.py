"""Rows of results -> one page and its figures."""
