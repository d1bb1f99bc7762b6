"""One contender in a process of its own, so that no two of them share threads: calls come in by line, answers go out.

python -m benchmarks.worker benchmarks.classic:Classic '{"seed": 0}'
"""

import importlib
import json
import os
import sys


def main() -> None:
    where, arguments = sys.argv[1], json.loads(sys.argv[2])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not be taken for an answer
    module, _, name = where.partition(":")
    made = getattr(importlib.import_module(module), name)
    contender = made(**arguments) if isinstance(made, type) else made
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        method, values = json.loads(line)
        call = contender if method == "" else getattr(contender, method)
        print(json.dumps(call(*values) if callable(call) else call), file=answers, flush=True)


if __name__ == "__main__":
    main()
