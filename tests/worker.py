"""One of several processes that share a run: ``worker.py OUT SEED SETTINGS [SLEEP]``; RANK and WORLD_SIZE are in the environment.

Prints ``ready`` once everything is loaded and waits for a line; then attributes, and prints how many passes it made.
"""

import json
import sys
import time

import forks
import torch

from attr_engine import attribute

torch.set_num_threads(1)
out, seed, changes, sleep = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3]), float(sys.argv[4])
model, tracks, queries = forks.make(seed)
predict, passes = model.predict, 0


def counted(*arguments):
    global passes
    passes += 1
    time.sleep(sleep)
    return predict(*arguments)


model.predict = counted
print("ready", flush=True)
sys.stdin.readline()
result = attribute(model, tracks, queries, forks.small(**changes), out)
print(json.dumps({"passes": passes, "first": result.top(1, queries.ids[0])[0].track}), flush=True)
