"""Shards of a cohort on Apache Beam: a cluster's workers in place of this machine's processes
(docs/beam.md).

The unit of work is the same, a shard, so the cohort is the same to its fingerprint, and a job that
fails goes on from the shards that are there. Workers need the raw files and the cohort's folder
under the same paths.

TFDS has a builder on Beam of its own. It sorts all records by key through the cluster and begins
anew after a failure; here ids, file names and rows of tables travel, no recording and no image.
"""

import re

import apache_beam
from apache_beam.options.pipeline_options import PipelineOptions

from mmcl_jax.errors import UserError


def run(write, shards, processes, options: list[str]) -> None:
  """Writes shards on Beam; `options` are the runner's flags, such as `--runner=DataflowRunner`.

  Without a runner Beam's local one is taken, with `processes` workers.
  """
  local = not any(option.startswith("--runner") for option in options)
  if local:
    options = [
      *options,
      "--runner=DirectRunner",
      "--direct_running_mode=multi_processing",
      f"--direct_num_workers={processes}",
    ]
  try:
    with apache_beam.Pipeline(options=PipelineOptions(options)) as pipeline:
      # Reshuffled: else the runner may fuse the list with the work and give all of it to one
      # worker.
      _ = pipeline | apache_beam.Create(shards) | apache_beam.Reshuffle() | apache_beam.Map(write)
  except (RuntimeError, ValueError) as error:
    reasons = re.findall(r"^(?:\w+\.)*\w*(?:Error|Exception): .*", str(error), re.MULTILINE) or [
      str(error)
    ]
    raise UserError(
      f"the Beam pipeline failed ({reasons[-1][:300]}); the same command goes on from the shards "
      "that are done"
    ) from error
