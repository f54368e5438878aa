"""The environment of Flower's simulation engine."""

import os
import subprocess
import sys

import pytest

from cotune.simulations.flower import engine_environment

BESIDE_FORKS = """
import os, subprocess, threading
import numpy as np

def fork():
    while True:  # as Ray starts its processes: what is to run in the child first makes it a real fork
        subprocess.run(["true"], preexec_fn=lambda: None)

threading.Thread(target=fork, daemon=True).start()
tall = np.random.default_rng(0).standard_normal((1536, 16))
for _ in range(300):
    np.linalg.qr(tall)
os._exit(0)
"""


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core has no threads to wait for")
def test_linear_algebra_ends_while_the_process_forks(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")  # with the threads of a user
    command = [sys.executable, "-W", "ignore", "-c", BESIDE_FORKS]
    subprocess.run(command, env=engine_environment(tmp_path, 1), check=True, timeout=60)
