"""The questions: every module here has a ``QUESTION``, and one more module is one more question."""

from __future__ import annotations

import importlib
import pkgutil

from bench.question import Question


def all_questions() -> list[Question]:
    """In the order of their numbers."""
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    questions = [importlib.import_module(f"{__name__}.{name}").QUESTION for name in names]
    return sorted(questions, key=lambda question: question.number)
