"""Modules: who talks to whom, through which subspaces, and how central the traffic is."""

from unweave.modules.communication import Communication, communication

__all__ = ["Communication", "communication"]
