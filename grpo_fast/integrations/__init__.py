"""Adapters for other trainers: one module or package for each, imported only when it is asked for."""
