"""Evaluation with EleutherAI's lm-evaluation-harness (extra ``eval``); nothing here is imported by what runs models.

``harness`` is this engine as a model of the harness, which ``arguments`` opens; it turns what the harness asks for into
``requests``, which run side by side in ``lanes``. ``problems`` reads the data of the tasks in ``tasks``. ``callback``
evaluates a model of transformers while it is trained.
"""

from pathlib import Path

TASKS = Path(__file__).parent / "tasks"
"""The folder of the tasks that come along (``lm_eval --include_path``)."""
