"""Comparison of all algorithms; see ``__main__``."""
