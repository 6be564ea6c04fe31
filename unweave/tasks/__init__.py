"""Behaviours as scopes: prompts, answers and corrupted prompts, for finding circuits."""

from unweave.tasks.checking import TaskCheck, check_task, require_solved
from unweave.tasks.loading import load_task, task_from_data
from unweave.tasks.making import list_tasks, make_task
from unweave.tasks.task import Metric, Task

__all__ = [
    "Metric",
    "Task",
    "TaskCheck",
    "check_task",
    "list_tasks",
    "load_task",
    "make_task",
    "require_solved",
    "task_from_data",
]
