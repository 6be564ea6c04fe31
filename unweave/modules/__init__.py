"""Modules: blocks of nodes, what crosses between them, what each does alone, and what may stand in for it."""

__all__: list[str] = []
