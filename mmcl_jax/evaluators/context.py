"""What an evaluator may look at: the run, the cohort, and embeddings shared by all evaluators."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from mmcl_jax import models
from mmcl_jax.data.cohort import Cohort
from mmcl_jax.evaluators import embeddings, statistics
from mmcl_jax.models import inference, towers
from mmcl_jax.training import restore


@dataclasses.dataclass(frozen=True)
class Context:
  """What an evaluator may look at.

  Attributes:
    run: config, model, mesh, step, state, scales and manifest (training.restore.Run).
    cohort: what is scored.
    split: its part that is scored, "val" while training and "test" in `mmcl evaluate`.
    workdir: of the run.
    batch: recordings at a time.
    note: for the foot of every figure, such as that the cohort is synthetic; may be empty.
    seen_people: who of the cohort had part in training, with a `note` on it; {} while training.
    records: while training, {"val": its records with the features of frozen towers}.
    kept, kept_for_the_run: see `once` and `once_a_run`.
  """

  run: restore.Run
  cohort: Cohort
  split: str
  workdir: str
  batch: int
  note: str = ""
  seen_people: dict = dataclasses.field(default_factory=dict)
  records: dict[str, Any] = dataclasses.field(default_factory=dict)
  kept: dict = dataclasses.field(default_factory=dict)
  kept_for_the_run: dict = dataclasses.field(default_factory=dict)

  def at(self, step: int, state) -> "Context":
    """The same for another state of the run."""
    return dataclasses.replace(self, run=self.run._replace(step=step, state=state), kept={})

  def once(self, key, make: Callable[[], Any]) -> Any:
    """`make()`, computed by the first evaluator that asks for `key` and shared with the others."""
    if key not in self.kept:
      self.kept[key] = make()
    return self.kept[key]

  def once_a_run(self, key, make: Callable[[], Any]) -> Any:
    """As `once`, and kept for later states of the run: for functions that JAX compiles."""
    if key not in self.kept_for_the_run:
      self.kept_for_the_run[key] = make()
    return self.kept_for_the_run[key]

  def say(self, text: str) -> None:
    """Prints a line on the first host, once a run."""
    if jax.process_index() == 0 and ("said", text) not in self.kept_for_the_run:
      self.kept_for_the_run["said", text] = True
      print(text, flush=True)

  @property
  def reads(self) -> str:
    """The modality of the embedding that is evaluated: "ECG", or "CMR" of a run without an ECG
    tower."""
    return "ECG" if "ecg" in self.run.config.model.towers else "CMR"

  @property
  def cmr_fields(self) -> tuple[str, ...]:
    """Stored CMR fields that the model looks at; () where the split has no CMR or lacks some."""
    fields = models.fields(self.run.config.model)
    shapes = self.cohort.info["shapes"]
    if not self.cohort.info["with_cmr"][self.split] or any(name not in shapes for name in fields):
      return ()
    return fields

  def why_unpaired(self) -> str:
    """Why the ECG of a person cannot be held against the CMR, in words; "" where it can."""
    model = self.run.config.model
    fields = models.fields(model)
    if "ecg" not in model.towers:
      return "the run has no ECG tower"
    if not towers.cmr(model):
      return "the run has no CMR tower"
    if not self.cmr_fields:
      return (
        f"the {self.split} split of {self.cohort.path} has no CMR, or lacks some of "
        f"{', '.join(fields)}"
      )
    return ""

  def untrained(self) -> dict:
    """Variables of the same model before any training."""

    def make():
      return restore.untrained(self.run)

    return self.once_a_run("untrained", make)

  def features(self, split: str) -> dict[str, np.ndarray]:
    """Embeddings and labels of all records of a split that have what the encoder reads.

    Returns:
      {name: [N, ...]}: embedding, random_embedding (of the untrained encoder), the projections of
      ECG and CMR where there are both, and the labels (evaluators.embeddings.LABELS).
    """

    def make():
      return self._embed(split)

    return self.once(("features", split), make)

  def _embed(self, split):
    run = self.run

    def make():
      embed = inference.make_embed(run.model, run.config, run.standardiser)

      def both(pair, rows):
        random = embed(pair[1], rows)["embedding"]
        return embed(pair[0], rows) | {"random_embedding": random}

      return jax.jit(both)

    with jax.set_mesh(run.mesh):
      features = embeddings.collect(
        self.once_a_run("embed", make),
        (run.state.variables, self.untrained()),
        self.cohort.splits[split],
        mesh=run.mesh,
        batch=self.batch,
        needs=f"has_{self.reads.lower()}",
        fields=self.cmr_fields if towers.cmr(run.config.model) else (),
        title=f"embed {split}",
      )
    if self.reads == "CMR":  # the ceiling is that of an ECG
      features.pop("ecg_parameters", None)
    return features

  def all_features(self) -> dict[str, dict[str, np.ndarray]]:
    """{"train", "val", "test": features}, "test" being the split that is scored."""
    return {
      "train": self.features("train"),
      "val": self.features("val"),
      "test": self.features(self.split),
    }

  def bootstrap(self, draws: int = 1000, seed: int = 0) -> np.ndarray:
    """Weights [draws, N] of the rows of `features(split)`, drawn with replacement by subject."""
    subject = self.features(self.split)["subject"]

    def make():
      return statistics.bootstrap_weights(subject, draws, seed)

    return self.once(("bootstrap", draws, seed), make)
