"""The local error of every size of the window, from one pass."""
