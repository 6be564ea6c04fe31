"""Modules: partitions of a graph's nodes into blocks that talk little to each other."""

__all__ = []  # type: list[str]
