"""Runs jobs in a process of their own, so that a crash or a hang of one loses only that one."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

Job = TypeVar("Job")
Answer = dict[str, Any]

START_SECONDS = 120.0  # until the process has imported torch and made a CUDA context, on a slow disk


class Runner:
    """Gives jobs to a worker process, one at a time, and starts another worker where one is lost.

    The worker is a Python module that says "ready", then reads one JSON document a line from standard input and
    answers each with one line of JSON on standard output; what else it prints goes to standard error. An answer whose
    "fatal" is true says that the process must not be used any more (a CUDA error ends a CUDA context).

    Args:
        module: name of the worker module.
        arguments: of its command line.
        environment: variables set for it, beside this process's own.
        seconds: how long one job may take.
    """

    def __init__(
        self,
        module: str,
        arguments: Iterable[str] = (),
        environment: Mapping[str, str] | None = None,
        seconds: float = 60,
    ):
        self._command = [sys.executable, "-m", module, *arguments]
        self._environment = {**os.environ, **(environment or {})}
        self.seconds = seconds
        self._process: subprocess.Popen | None = None
        self._lines: queue.Queue[str | None] = queue.Queue()

    def __enter__(self) -> "Runner":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def run(self, jobs: Iterable[tuple[Job, Any]]) -> Iterator[tuple[Job, Answer]]:
        """For each (job, document) in turn: the job and the worker's answer, or {"lost": why there is none}."""
        for job, document in jobs:
            answer = self._ask(document)
            if answer.get("fatal") or "lost" in answer:
                self._stop()
            yield job, answer

    def _ask(self, document: Any) -> Answer:
        if self._process is None:
            lost = self._start()
            if lost is not None:
                return lost
        try:
            self._process.stdin.write(json.dumps(document) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return self._ended()
        return self._answer(self.seconds)

    def _start(self) -> Answer | None:
        self._process = subprocess.Popen(
            self._command, env=self._environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._lines = queue.Queue()
        threading.Thread(target=self._read, args=(self._process.stdout, self._lines), daemon=True).start()
        answer = self._answer(START_SECONDS)
        return answer if "lost" in answer else None

    @staticmethod
    def _read(stream: Iterable[str], lines: "queue.Queue[str | None]") -> None:
        for line in stream:
            lines.put(line)
        lines.put(None)

    def _answer(self, seconds: float) -> Answer:
        try:
            line = self._lines.get(timeout=seconds)
        except queue.Empty:
            return {"lost": f"no result after {seconds:.0f} s"}
        return self._ended() if line is None else json.loads(line)

    def _ended(self) -> Answer:
        code = self._process.wait()
        return {"lost": f"the process ended by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"}

    def _stop(self) -> None:
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process = None
