"""What soak.py computes; the hour itself is a command."""

import pytest

import soak


def test_slopes_and_drift_are_those_of_the_second_half():
  """Memory that grows by 100 MiB in the first half and by 3.6 an hour in the second; a rate from 2
  to 1.8; 0.5 s a step."""
  samples, step = [], 0.0
  for i in range(200):
    step += 10 * (2.0 if i < 100 else 2.0 - 0.2 * (i - 100) / 99)
    samples.append(
      {
        "s": 10.0 * i,
        "mib": i if i < 100 else 100 + (i - 100) * 0.01,
        "files": 20,
        "threads": 9,
        "disk_mib": 1.5,
        "step": step,
        "cpu_s": 7 + step / 2,
        "load": 1.0,
      }
    )
  found = soak.summary([*samples, {"left_after_s": 1.0, "status": 75}])
  assert (
    found["MiB an hour"] == pytest.approx(3.6)
    and found["files an hour"] == 0
    and found["files at the end"] == 20
  )
  assert found["steps/s"] == pytest.approx(1.9, abs=0.02) and found["drift of the rate"] == "-10.5%"
  assert found["processor s a step"] == 0.5 and found["drift of it"].strip("+-") == "0.0%"
  assert found["status"] == 75
  stuck = soak.summary(
    [*(one | {"step": 3} for one in samples), {"left_after_s": 1.0, "status": 75}]
  )
  assert stuck["steps/s"] == 0 and stuck["drift of it"] == "+nan%"
