"""Whether mixkv can work here, and what is in its way: each check is one sentence that says what to do."""

from .check import NOTE, OK, PROBLEM, Check
from .run import diagnose

__all__ = ["NOTE", "OK", "PROBLEM", "Check", "diagnose"]
