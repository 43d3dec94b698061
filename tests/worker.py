"""One of several processes that share a run: ``worker.py OUT SEED SETTINGS SLEEP [WHAT PASS FLAG]``; RANK and WORLD_SIZE are in
the environment.

WHAT happens at the pass of that number, and only where the file FLAG is not there yet, which is made: ``kill`` is SIGKILL,
``fail`` an exception. Prints ``ready`` once everything is loaded and waits for a line; then attributes, and prints how many passes it made.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import forks
import torch

from attr_engine import UserError, attribute

torch.set_num_threads(1)
out, seed, changes, sleep = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3]), float(sys.argv[4])
what, when, flag = (
    (sys.argv[5], int(sys.argv[6]), Path(sys.argv[7])) if len(sys.argv) > 5 else ("", 0, Path())
)
model, tracks, queries = forks.make(seed)
predict, passes = model.predict, 0


def counted(*arguments):
    global passes
    passes += 1
    if passes == when and not flag.exists():
        flag.touch()
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise UserError("this process had enough")
    time.sleep(sleep)
    return predict(*arguments)


model.predict = counted
print("ready", flush=True)
sys.stdin.readline()
result = attribute(model, tracks, queries, forks.small(**changes), out)
print(json.dumps({"passes": passes, "first": result.top(1, queries.ids[0])[0].track}), flush=True)
