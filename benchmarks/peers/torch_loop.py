"""No server at all: the model asked about batches of random pixels, one after another."""

import sys
import time

import numpy as np
from model import MAX_BATCH, Model

seconds = float(sys.argv[1])
model = Model()
shape = (model.channels, model.size, model.size)
images = list(np.random.default_rng(0).integers(0, 256, (MAX_BATCH, *shape), dtype=np.uint8))
warm_until_s = time.perf_counter() + 1.0
while time.perf_counter() < warm_until_s:
    model.predict(images)
began_s, batches = time.perf_counter(), 0
while time.perf_counter() < began_s + seconds:
    model.predict(images)
    batches += 1
print(batches * MAX_BATCH / (time.perf_counter() - began_s))
