"""A small run of the deployment study."""

import pytest

from experiments import deployment
from tests.studies.outcomes import check_width, read


def test_the_steps_of_deployment(tmp_path, capsys):
    flags = "--train-size 300 --test-size 100 --seeds 0 --epochs 6 --tune-epochs 3 --batch-size 32 --rounds 2"
    deployment.main([*flags.split(), "--out", str(tmp_path)])
    lines = read(tmp_path)
    steps = {line["step"]: line for line in lines}
    assert list(steps) == list(deployment.STEPS)
    dense = steps["compiled"]
    assert (dense["parameters"], dense["macs"]) == (21_840, 480_500)
    assert dense["accuracy"] > 0.5
    for step in ("smaller", "distilled", "channels"):
        assert (steps[step]["parameters"], steps[step]["macs"]) == (5_675, 156_250)
        assert steps[step]["program_bytes"] < 0.5 * dense["program_bytes"]
    assert steps["weights"]["nonzero"] == 21_840 - round(0.9 * 21_750)
    assert steps["weights"]["program_bytes"] == dense["program_bytes"]  # its zeros are all there
    files = {step: line["file_bytes"] for step, line in steps.items()}
    assert files["int8"] < 0.3 * files["compiled"] < files["compiled"] == files["eager"]
    assert files["weights"] < 0.3 * files["int8"]
    assert files["channels"] == pytest.approx(files["distilled"], rel=0.1)
    assert {step for step, line in steps.items() if line["speed_up"] > 0} == set(deployment.STEPS)
    assert steps["compiled"]["speed_up"] == 1
    table = capsys.readouterr().out.split("Wrote")[0]
    check_width(table)
    assert "channels pruned, taught, int8" in table
