"""Tasks: what is asked, and the embedded suite."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mmfuse.errors import ConfigError, unknown
from mmfuse.eval.tasks.handwriting import handwriting_tasks
from mmfuse.eval.tasks.items import Item, MediaFile, Request, Task
from mmfuse.eval.tasks.pictures import picture_tasks

__all__ = ["Item", "MediaFile", "Request", "Task", "find_tasks", "task_names"]


def _builders() -> dict[str, Callable[[], Task]]:
    return {**handwriting_tasks(), **picture_tasks()}


def task_names() -> dict[str, tuple[str, ...]]:
    """Groups of tasks by name, each task also as a group of its own."""
    handwriting, pictures = tuple(handwriting_tasks()), tuple(picture_tasks())
    groups = {"suite": handwriting + pictures, "handwriting": handwriting, "pictures": pictures}
    return groups | {name: (name,) for name in handwriting + pictures}


def find_tasks(names: Sequence[str]) -> list[Task]:
    """The tasks of these names and groups, each once, in the order asked.

    Raises:
        ConfigError: there is no such task.
    """
    known, builders = task_names(), _builders()
    for name in names:
        if name not in known:
            raise ConfigError(f"--tasks: {unknown('task', name, known)}")
    return [builders[one]() for one in dict.fromkeys(one for name in names for one in known[name])]
