"""Run tasks of lm-evaluation-harness, with its own package."""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from orchestrator.deploy.scoring.forms import OpenForm
from orchestrator.errors import RequestError
from orchestrator.spec.optional_packages import require_package


@dataclass(frozen=True)
class Harness:
    """Tasks whose data are loaded."""

    manager: Any
    tasks: list[str]
    limit: int | None
    """Number of rows to use of each task; None for all."""

    def measure(self, opened: OpenForm, batch_size: int) -> dict[str, float]:
        """Run the tasks.

        Returns:
            `task/metric` -> value, such as `hellaswag/acc`. A filter other than `none` follows the metric.
        """
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        model = HFLM(pretrained=opened.model, tokenizer=opened.tokenizer, batch_size=batch_size)
        found = simple_evaluate(
            model=model,
            tasks=self.tasks,
            task_manager=self.manager,
            limit=self.limit,
            bootstrap_iters=0,  # no standard errors
            log_samples=False,
        )
        return {
            f"{task}/{name.removesuffix(',none')}": float(value)
            for task, values in found["results"].items()
            for name, value in values.items()
            if isinstance(value, int | float) and "," in name
        }


def open_harness(tasks: Sequence[str], folder: Path | None = None, limit: int | None = None) -> Harness:
    """Find the tasks and their data, before any model is loaded.

    Args:
        tasks: names of tasks, groups or tags.
        folder: folder of additional tasks (YAML).
        limit: use only the first rows of each task.

    Raises:
        RequestError: the package is missing; there is no such folder or task; the task's file is not valid YAML; or the
            task or its data cannot be loaded.
    """
    require_package("lm_eval", "--tasks", "harness")
    if folder is not None and not folder.is_dir():  # the package would ignore it
        raise RequestError(f"--tasks-folder {folder}: there is no such folder")
    from datasets.exceptions import DatasetsError
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder) if folder else None)
    for task in tasks:
        if task not in manager.all_tasks:
            if folder is not None:
                _require_yaml(folder, task)
            near = get_close_matches(task, manager.all_tasks, n=5)
            raise RequestError(
                f"--tasks {task!r}: lm-evaluation-harness has no such task",
                f"Did you mean {', '.join(near)}?" if near else "`lm-eval ls tasks` lists all tasks.",
            )
    try:
        manager.load(list(tasks))
    except Exception as error:  # the file of a task may contain Python, which may raise anything
        cause = error.__cause__ if isinstance(error, DatasetsError) and error.__cause__ else error
        lines = str(cause).strip().splitlines()
        raise RequestError(
            f"--tasks {','.join(tasks)}: cannot be loaded: {type(cause).__name__}{f': {lines[0]}' if lines else ''}"
        ) from error
    return Harness(manager, list(tasks), limit)


def _require_yaml(folder: Path, task: str) -> None:
    """Raise RequestError if a file is not valid YAML. The package skips such files, so that their tasks are missing."""
    for path in sorted(folder.rglob("*.yaml")):
        try:
            for _ in yaml.parse(path.read_bytes()):  # parsing does not resolve tags such as !function
                pass
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = f" line {mark.line + 1}:" if mark else ""
            fault = getattr(error, "problem", None) or error
            raise RequestError(
                f"--tasks {task!r}: there is no such task; {path}:{line} is not valid YAML: {fault}"
            ) from error
