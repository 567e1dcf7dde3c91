"""Ask the questions, print what came out, and say by the exit status whether it is good enough."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from pathlib import Path

from bench import machine, report
from bench.question import Answer, Question, Scale, ask, say
from bench.questions import all_questions

RESULTS = Path(__file__).parent / "results"


def arguments(questions: list[Question]) -> argparse.Namespace:
    numbers = [question.number for question in questions]
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("question", type=int, nargs="*", choices=[*numbers, []], help="numbers; by default all")
    parser.add_argument(
        "--quick", action="store_true", help="less of everything, and bars do not decide the exit status"
    )
    parser.add_argument("--rounds", type=int, help="of each question (default: 5; quick: 1)")
    parser.add_argument("--seconds", type=float, help="of each run (default: 1; quick: 0.5)")
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to be used")
    return parser.parse_args()


def main() -> int:
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # and so take back what was set up
    questions = all_questions()
    options = arguments(questions)
    quick = options.quick
    scale = Scale(
        rounds=options.rounds or (1 if quick else 5),
        seconds=options.seconds or (0.5 if quick else 1),
        quick=quick,
        base=options.directory,
    )
    wanted = [question for question in questions if not options.question or question.number in options.question]
    directory = RESULTS / time.strftime("%Y%m%dT%H%M%S")
    directory.mkdir(parents=True)
    answers: list[Answer] = []
    with machine.awake() as polls:
        about = machine.description(polls=polls)
        for question in wanted:
            answers.append(ask(question, scale))
            # After each of them: a run that is interrupted has not been for nothing.
            text = report.as_markdown(answers, about, scale)
            (directory / "report.md").write_text(text)
            (directory / "report.json").write_text(json.dumps(report.as_json(answers, about, scale), indent=1) + "\n")
            report.draw(answers[-1], directory)
            report.draw_bars(answers, directory)
    print(text)
    say(f"{directory}")
    short = report.shortfalls(answers)
    for line in short:
        say(line)
    if quick:
        return int(any(answer.error for answer in answers))
    return int(bool(short))


if __name__ == "__main__":
    sys.exit(main())
