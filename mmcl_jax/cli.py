"""`mmcl VERB ...` is `python -m mmcl_jax.VERB ...`."""

import contextlib
import importlib
import os
import sys

from mmcl_jax.errors import UserError
from mmcl_jax.training import distributed

PROGRAMS = {
    "prepare": "raw recordings and images, or the synthetic heart, to a cohort",
    "inspect": "what a cohort holds, and one of its records as a picture",
    "train": "joint pre-training of an ECG encoder with cardiac MRI",
    "compile": "what a recipe's training step needs on a TPU slice, told without a TPU",
    "evaluate": "phenotypes, diseases and retrieval from a saved checkpoint",
    "compare": "evaluated runs side by side, on the same test subjects",
    "convert": "weights of PyTorch to a workdir, and a tower back to PyTorch",
    "embed": "embeddings and predicted phenotypes of new ECG recordings",
}
ON_HOSTS = ("train", "evaluate", "embed")  # may run as one of several processes


def run(program, argv=None, hosts=False):
  """Runs a program's main(argv); a UserError becomes one line on stderr and exit status 2.

  Args:
    hosts: the program may run on several hosts (training.distributed), which then all end alike.
  """
  argv = sys.argv[1:] if argv is None else argv
  try:
    with distributed.joined(argv) if hosts else contextlib.nullcontext(argv) as rest:
      return program(rest)
  except UserError as error:
    print(f"mmcl: error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(2)
  except KeyboardInterrupt:
    print("mmcl: interrupted; the same command goes on from what is saved", file=sys.stderr)
    sys.exit(130)
  except BrokenPipeError:  # the reader of our output has gone (`mmcl ... | head`)
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(1)


def main():
  verb, *rest = sys.argv[1:] or ["--help"]
  if verb in ("-h", "--help"):
    print("usage: mmcl VERB [--flags]; mmcl VERB --help tells a verb's flags\n")
    print("\n".join(f"  {name:10s}{what}" for name, what in PROGRAMS.items()))
    return
  if verb not in PROGRAMS:
    print(f"mmcl: error: no verb {verb!r}; there are {', '.join(PROGRAMS)}", file=sys.stderr)
    sys.exit(2)
  run(importlib.import_module(f"mmcl_jax.{verb}").main, rest, hosts=verb in ON_HOSTS)
