"""Horovod's process sets: the class, the global set, and the functions that add and remove others."""

from ...lifecycle import add_process_set, remove_process_set
from ...process_sets import ProcessSet, global_process_set

__all__ = ["ProcessSet", "add_process_set", "global_process_set", "remove_process_set"]
