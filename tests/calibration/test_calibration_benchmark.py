"""Small runs of the benchmarks of calibration."""

import importlib.util
from dataclasses import replace

from experiments.benchmarks import calibration, solvers

PEER = """
class Peer:
    def __init__(self, params, batches, heads, sparsity, threads):
        assert len(params["layers"]) == len(batches) == 2

    def prune(self):
        return 0.5
"""


def test_calibration_benchmark(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(PEER)
    lines = calibration.run(replace(calibration.SMALL, peer=str(file)))
    ratios = {line[:32].strip(): line[32:].split()[0] for line in lines[1:] if "(" in line}
    parts = ["the parts together", "forward passes", "Gram products", "factorisations"]
    torch = ["PyTorch"] if importlib.util.find_spec("torch") else []
    assert list(ratios) == [*parts, *torch, "peer"]
    assert all(float(ratio) > 0 for ratio in ratios.values())
    assert float(ratios["the parts together"]) < float(ratios["factorisations"])
    assert all(len(line) <= 80 for line in lines)


def test_solvers_benchmark():
    head, *rows = solvers.run(solvers.SMALL)
    errors = {row[:24].strip(): [float(cell) for cell in row[24:].split()[:3]] for row in rows}
    assert head.startswith("4x16")
    assert errors.keys() == {*solvers.SMALL.solvers, "exact OBC"}
    assert all(errors["ALPS + 20 steps"][n] < errors["magnitude"][n] for n in range(3))
