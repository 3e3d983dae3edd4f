"""The process in which trials run: answers each line {"level", "number", "backend", "dtype"} on standard input."""

import argparse
import importlib
import json
import os
import sys
import traceback

import torch

from cnkernels.check import emulation
from cnkernels.check.cases import cases
from cnkernels.check.trial import Trial, fault


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", type=torch.device, required=True)
    parser.add_argument("--emulated", action="store_true")
    parser.add_argument("--preload", action="append", default=[])
    options = parser.parse_args()
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever a kernel prints must not be taken for an answer
    if options.emulated:
        emulation.prepare()
    for module in options.preload:
        importlib.import_module(module)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # with NaN: an element that nobody wrote is wrong
    print(json.dumps({"ready": True}), file=answers, flush=True)
    known: dict[str, list] = {}
    for line in sys.stdin:
        job = json.loads(line)
        level = job["level"]
        case = known.setdefault(level, list(cases(level)))[job["number"]]
        trial = Trial(case, job["number"], job["backend"], getattr(torch, job["dtype"]))
        torch.manual_seed(0)
        try:
            answer = {"fault": fault(trial, options.device)}
            if options.device.type == "cuda":
                torch.cuda.synchronize(options.device)
        except torch.OutOfMemoryError:
            answer = {"no_memory": True}
        except Exception as error:  # whatever a kernel raises is its fault, and the next trial is another's
            traceback.print_exc()
            lines = str(error).strip().splitlines() or ["no message"]
            poisoned = isinstance(error, torch.AcceleratorError)
            answer = {"fault": f"{type(error).__name__}: {lines[0]}", "fatal": poisoned}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
