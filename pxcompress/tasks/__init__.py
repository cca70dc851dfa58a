"""Tasks: what a model's outputs mean, how good they are, how similar to another model's, and where relevance starts.

One task a file, found by itself; `pxcompress.tasks.task.Task` says what a task has to say. README.md here shows how to
add one.
"""

from pxcompress.registry import Registry
from pxcompress.tasks.task import Task

TASKS: Registry[Task] = Registry("task", __name__, Task)
