"""Starts one program on several hosts, which are processes of this machine."""

import os
import socket
import subprocess
import sys
import threading

from common import PATH, simulated

# Settings that other frameworks ask for, and that would change numbers: here only where there are
# several hosts.
OTHER_NUMERICS = {
  "JAX_DEFAULT_PRNG_IMPL": "rbg",
  "JAX_THREEFRY_PARTITIONABLE": "0",
  "JAX_ENABLE_X64": "1",
}
# As a clinic's login profile may set it. Hosts meet without it.
DEAD_PROXY = {
  "http_proxy": "http://127.0.0.1:1",
  "https_proxy": "http://127.0.0.1:1",
  "no_proxy": "example.org",
}


def launch(code, count, devices, *args, each=lambda i: (), timeout=1200):
  """Runs code on `count` hosts with `devices` devices each: [(status, stdout, stderr)]."""
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{s.getsockname()[1]}"
  env = (
    {name: value for name, value in os.environ.items() if "_proxy" not in name.lower()}
    | DEAD_PROXY
    | simulated(devices)
    | {
      "JAX_LOG_COMPILES": "1",
      "TF_CPP_MIN_LOG_LEVEL": "2",
      "PYTHONPATH": PATH,
    }
  )
  env |= OTHER_NUMERICS if count > 1 else {}

  def flags(i):
    return (
      [f"--coordinator={address}", f"--processes={count}", f"--process={i}"] if count > 1 else []
    )

  running = [
    subprocess.Popen(
      [sys.executable, "-c", code, *map(str, args), *flags(i), *each(i)],
      env=env,
      text=True,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
    )
    for i in range(count)
  ]
  found = [None] * count

  def wait(i):
    try:
      out, err = running[i].communicate(timeout=timeout)
    finally:
      running[i].kill()
    found[i] = running[i].returncode, out, err

  threads = [threading.Thread(target=wait, args=(i,)) for i in range(count)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert None not in found, "a host was still running at the timeout"
  return found


def statuses(found):
  return [status for status, _, _ in found]


def errors(found):
  return [
    [line for line in err.splitlines() if line.startswith("mmcl: error:")] for _, _, err in found
  ]


def said(found):
  return "\n".join(err[-2000:] for _, _, err in found)
