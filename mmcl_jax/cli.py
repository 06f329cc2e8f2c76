"""`mmcl VERB ...`: runs the `main(argv)` of a program."""

import contextlib
import importlib
import os
import sys

from mmcl_jax.errors import UserError, one_line, printable
from mmcl_jax.training import distributed, signals

PROGRAMS = {
  "prepare": "raw recordings and images, or the synthetic heart, to a cohort",
  "inspect": "what a cohort holds, and one of its records as a picture",
  "train": "a recipe: joint pre-training of an ECG encoder with cardiac MRI, or a stage of it",
  "compile": "what a recipe's training step needs on TPUs or GPUs, told without one",
  "evaluate": "phenotypes, diseases, retrieval and localisation from a saved checkpoint",
  "compare": "evaluated runs side by side, on the same test subjects",
  "convert": "weights of PyTorch to a workdir, and a tower back to PyTorch",
  "export": "the ECG encoder as one StableHLO file that runs without this package, "
  "and its model card",
  "embed": "embeddings and predicted phenotypes of new ECG recordings",
  "generate": "hearts drawn from ECG recordings: images, labels and what they measure",
}
# verb -> its module, where that is not mmcl_jax.VERB
ELSEWHERE = {
  "compile": "mmcl_jax.tools.compile_step",
  "generate": "mmcl_jax.projects.generation.generate",
}
ON_HOSTS = ("train", "evaluate", "embed")  # may run as one of several processes


def run(main, argv=None, hosts=False):
  """Runs a program's main(argv); a UserError becomes one line on stderr and exit status 2.

  SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2 end a program as Ctrl-C does, cleaning up, but with status 75
  (EX_TEMPFAIL: run the command again); training saves first (training.signals).

  Args:
    hosts: the program may run on several hosts (training.distributed), which then all end alike.
  """
  argv = sys.argv[1:] if argv is None else argv
  try:
    on_hosts = distributed.connected(argv) if hosts else contextlib.nullcontext(argv)
    with contextlib.redirect_stdout(Inert(sys.stdout)), on_hosts as rest:
      if matplotlib := sys.modules.get("matplotlib"):
        # a matplotlibrc in the current folder may have every name run through LaTeX
        matplotlib.rcdefaults()
      # Not before: nothing of Python runs while the hosts come together.
      with signals.handled(signals.interrupt), signals.watched():
        return main(rest)
  except UserError as error:
    print(f"mmcl: error: {one_line(error)}", file=sys.stderr)
    sys.exit(2)
  except KeyboardInterrupt as signalled:
    signals.ending()
    print("mmcl: interrupted; the same command goes on from what is saved", file=sys.stderr)
    if (status := distributed.status_of(signalled)) == os.EX_TEMPFAIL:
      # else multiprocessing may report at length that its resource tracker died of the same signal
      signals.mute(2)
    sys.exit(status)
  except BrokenPipeError:  # the reader of our output has gone (`mmcl ... | head`)
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(1)


class Inert:
  """A text stream that passes on no control characters: a name in the text cannot command the
  terminal."""

  def __init__(self, stream):
    self.stream = stream

  def write(self, text: str) -> int:
    return self.stream.write(printable(text))

  def __getattr__(self, name):
    return getattr(self.stream, name)


def program(verb: str):
  """The module of a verb, with its `main(argv)`."""
  return importlib.import_module(ELSEWHERE.get(verb, f"mmcl_jax.{verb}"))


def main():
  verb, *rest = sys.argv[1:] or ["--help"]
  if verb in ("-h", "--help"):
    print("usage: mmcl VERB [--flags]; mmcl VERB --help tells a verb's flags\n")
    print("\n".join(f"  {name:10s}{what}" for name, what in PROGRAMS.items()))
    return
  if verb not in PROGRAMS:
    print(f"mmcl: error: no verb {verb!r}; there are {', '.join(PROGRAMS)}", file=sys.stderr)
    sys.exit(2)
  run(program(verb).main, rest, hosts=verb in ON_HOSTS)
