"""Adapters: one module per host library, each imported only when it is asked for."""
