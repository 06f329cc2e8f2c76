"""`mmcl convert`: PyTorch weights become a workdir that every program takes, and come out of one
again."""

import json

import numpy as np
import pandas as pd
import pytest
import wfdb

torch = pytest.importorskip(
  "torch", reason="the tests of PyTorch weights need torch: pip install '.[torch]'"
)

import torch_models as published
from common import ROOT, only_evaluators, tiny_flags
from mistakes import error_of

from mmcl_jax import cli, convert, embed, evaluate, train
from mmcl_jax.data import pipeline, schema, synthetic
from mmcl_jax.data.preprocess.ecg import normalise
from mmcl_jax.errors import UserError
from mmcl_jax.interop import torch_weights
from mmcl_jax.training import restore

# the ECG encoder of the recipes' test size, and its MAE decoder
TEST, PATCH, SAMPLES = (16, 1, 2), 100, 500


@pytest.fixture(scope="module")
def autoencoder():
  return (
    published.randomise(published.MaskedAutoencoder(*TEST, PATCH, SAMPLES, TEST), seed=3)
    .float()
    .eval()
  )


@pytest.fixture(scope="module")
def converted(autoencoder, tmp_path_factory):
  folder = tmp_path_factory.mktemp("convert")
  torch.save({"model": autoencoder.state_dict(), "epoch": 3}, folder / "mae.pth")
  convert.main([f"--input={folder / 'mae.pth'}", f"--out={folder / 'w'}", "--ecg_profile=minimal"])
  return folder / "w"


def windows(ecg):
  """[12, 5000] -> [10, 12, 500], float32 tensor."""
  return torch.tensor(ecg.reshape(12, -1, SAMPLES).swapaxes(0, 1).copy())


def test_embeddings_are_those_of_torch(converted, autoencoder, tmp_path):
  """From a raw file through the reader, the profile and `mmcl embed`: the mean over windows of what
  torch gives."""
  (tmp_path / "in").mkdir()
  ecgs = [synthetic.subject(1, i)["ecg"] for i in range(2)]
  for i, ecg in enumerate(ecgs):
    wfdb.wrsamp(
      f"r{i}",
      fs=500,
      units=["mV"] * 12,
      sig_name=list(schema.LEADS),
      p_signal=ecg.T.astype(float),
      fmt=["16"] * 12,
      adc_gain=[2000.0] * 12,
      baseline=[0] * 12,
      write_dir=str(tmp_path / "in"),
    )
  embed.main([f"--workdir={converted}", f"--input={tmp_path / 'in'}", f"--out={tmp_path / 'out'}"])
  found = pd.read_parquet(tmp_path / "out")["embedding"]
  for row, ecg in zip(found, ecgs, strict=True):
    expected = autoencoder(windows(normalise(ecg, "minimal"))).mean(dim=0).detach().numpy()
    # 0.5 uV steps of the file
    np.testing.assert_allclose(row, expected, atol=0.01 * np.abs(expected).max())


def test_a_converted_run_is_evaluated(converted, cohort, monkeypatch):
  only_evaluators(monkeypatch, "phenotypes")
  results = evaluate.evaluate(str(converted), cohort_path=cohort.path)
  assert results["step"] == 0 and results["counts"]["test"] == cohort.info["counts"]["test"]
  saved = np.load(converted / "evaluation/0/predictions.npz")
  assert np.isfinite(saved["embedding"]).all()
  with pytest.raises(UserError, match="cohort"):  # none is named in a converted run
    evaluate.evaluate(str(converted))


def test_a_stage_starts_from_it(converted, autoencoder, cohort, tmp_path):
  """At a learning rate of 0 the tower of the later stage is still the one of the file."""
  flags = [
    flag.replace("joint.py:test", "joint.py:test,arm=mae")
    for flag in tiny_flags(cohort.path, tmp_path / "w")
  ]
  train.main(
    flags
    + [
      f"--config.init_from.ecg={converted}",
      "--config.optimizer.learning_rate=0.0",
      "--config.steps=1",
    ]
  )
  run = restore.load_run(str(tmp_path / "w"))
  assert run.step == 1
  state = torch_weights.state_dict(run.model, run.state.variables, "ecg_mae")
  for key, x in autoencoder.state_dict().items():
    np.testing.assert_allclose(
      state[key], x, atol=1e-6 if key.endswith("pos_embed") else 0, rtol=0, err_msg=key
    )


def test_a_stage_starts_from_st_mem(cohort, tmp_path, capsys):
  """CardioNets' alignment, here with a CMR tower that starts at random; at a learning rate of 0 the
  encoder stays."""
  encoder = published.randomise(published.StMem(*TEST, PATCH, SAMPLES), seed=5).float().eval()
  torch.save({"model": encoder.state_dict()}, tmp_path / "st_mem.pth")
  convert.main(
    [
      f"--input={tmp_path / 'st_mem.pth'}",
      f"--out={tmp_path / 'w'}",
      "--heads=2",
      "--ecg_profile=minimal",
    ]
  )
  assert "ECG encoder: ST-MEM, 16 wide, 1 blocks, 2 heads" in capsys.readouterr().out
  recipe = f"{ROOT}/configs/cardionets.py:test,stage=align,encoder=st_mem,steps=1"
  train.main(
    [
      f"--config={recipe}",
      f"--workdir={tmp_path / 'later'}",
      f"--config.data.cohort={cohort.path}",
      f"--config.init_from.ecg={tmp_path / 'w'}",
      "--config.model.towers.cine.frozen=False",
      "--config.init_except=()",
      "--config.optimizer.learning_rate=0.0",
      "--config.evaluators.probes.every=0",
    ]
  )
  run = restore.load_run(str(tmp_path / "later"))
  state = torch_weights.state_dict(run.model, run.state.variables, "ecg")
  for key, x in encoder.state_dict().items():
    np.testing.assert_array_equal(state[key], x, err_msg=key)


def test_an_encoder_with_covariates_becomes_a_run_to_start_from(cohort, tmp_path, capsys):
  net = published.ViT(*TEST, PATCH, SAMPLES, pool="cls", norms=("norm",), head=5, covariates=4)
  torch.save({"model": published.randomise(net).state_dict()}, tmp_path / "film.pth")
  convert.main(
    [f"--input={tmp_path / 'film.pth'}", f"--out={tmp_path / 'w'}", "--ecg_profile=minimal"]
  )
  assert capsys.readouterr().out.strip().endswith(", for config.init_from")
  with pytest.raises(UserError, match="covariates, whose names and scales .* does not tell"):
    evaluate.evaluate(str(tmp_path / "w"), cohort_path=cohort.path)


def test_a_run_goes_out_to_torch(converted, autoencoder, tmp_path, capsys):
  convert.main([f"--workdir={converted}", f"--out={tmp_path / 'ecg.safetensors'}", "--tower=ecg"])
  assert "left out: ecg/decoder (" in capsys.readouterr().out
  from safetensors.torch import load_file

  net = published.ViT(*TEST, PATCH, SAMPLES).float().eval()
  net.load_state_dict(load_file(tmp_path / "ecg.safetensors"), strict=True)
  x = torch.randn(3, 12, SAMPLES, generator=torch.Generator().manual_seed(0))
  torch.testing.assert_close(net(x), autoencoder(x), atol=1e-5, rtol=1e-5)
  ours = restore.load_run(str(converted))
  found = ours.model.apply(ours.state.variables, x.numpy(), method="encode_ecg")["ecg_embedding"]
  np.testing.assert_allclose(found, net(x).detach(), atol=1e-5)


def test_a_cmr_encoder_becomes_a_run(cohort, tmp_path, capsys):
  net = published.randomise(published.ResNet(4, published.Basic, ((4, 1), (8, 1)))).eval()
  torch.save(
    {
      "state_dict": {
        f"encoder_imaging.{key}": x for key, x in net.sequential().state_dict().items()
      }
    },
    tmp_path / "image.pth",
  )
  cli.run(convert.main, [f"--input={tmp_path / 'image.pth'}", f"--out={tmp_path / 'w'}"])
  told = capsys.readouterr().out
  assert "CMR encoder image: a ResNet with torchvision's keys, size test, 3 channels" in told
  assert "ignored, counters of batches: encoder_imaging.1.num_batches_tracked" in told
  run = restore.load_run(str(tmp_path / "w"))
  batch = next(pipeline.one_pass(cohort.splits["test"], batch=4, fields=("three_frames",)))
  planes = batch["cmr"]["three_frames"].astype(np.float32) / 255
  found = run.model.apply(
    run.state.variables,
    {"cmr": {"three_frames": planes}, "mask": np.ones(4), "has_cmr": np.ones(4)},
    method="encode_cmr",
  )["image"]
  expected = net(torch.tensor(planes)).detach().numpy()
  for name in ("features", "embedding", "projection"):
    np.testing.assert_allclose(
      found[name], expected, atol=2e-5 * np.abs(expected).max(), err_msg=name
    )


def test_the_config_and_what_was_recognised_are_told(converted, tmp_path, autoencoder, capsys):
  config = json.loads((converted / "config.json").read_text())
  assert (
    config["data"]["samples"] == SAMPLES
    and config["data"]["ecg_profile"] == "minimal"
    and config["model"]["towers"]["ecg"]["size"] == "test"
  )
  manifest = json.loads((converted / "checkpoints/0/meta/manifest.json").read_text())
  assert manifest["origin"] == "mae.pth" and manifest["files"]
  net = published.ViT(384, 3, 6, 100, 2500)
  torch.save(net.float().state_dict(), tmp_path / "tiny.pth")
  convert.main([f"--input={tmp_path / 'tiny.pth'}", f"--out={tmp_path / 'tiny'}"])
  told = capsys.readouterr().out
  for words in (
    "ViT with timm's keys, 384 wide, 3 blocks, 6 heads (size tiny), patches of 100 samples, 2500 "
    "samples",
    "arrays of 5,3",
    "ECG profile mmcl, as published with this encoder",
    "no projection head in the file",
  ):
    assert words in told, words


@pytest.mark.parametrize(
  "flags, words",
  [
    (["--input={tmp}/good.pth", "--workdir=w", "--out={tmp}/x"], "not allowed with"),
    (["--input={tmp}/text.pth", "--out={tmp}/x"], "no zip archive; expected a file of torch.save"),
    (["--input={tmp}/good.pth", "--out={tmp}"], "is there already and not empty"),
    (["--input={tmp}/good.pth", "--out={tmp}/x", "--ecg_profile=nope"], "expected one of minimal"),
    (
      ["--input={tmp}/good.pth", "--out={tmp}/x", "--samples=9000"],
      "sees 9000 samples, the profile minimal gives 5000",
    ),
    (
      ["--input={tmp}/good.pth", "--out={tmp}/x", "--samples=450"],
      "does not divide config.data.samples = 450",
    ),
    (
      ["--input={tmp}/good.pth", "--out={tmp}/x", "--heads=5"],
      "heads is 5, which does not divide the width of 16",
    ),
    (
      ["--input={tmp}/good.pth", "--out={tmp}/x", "--ignore=^blocks.0.norm1.bias"],
      "missing: blocks.0.norm1.bias (16,)",
    ),
    (["--input={tmp}/good.pth", "--out={tmp}/text.pth/x"], "cannot write to {tmp}/text.pth/x"),
    (["--input={tmp}/good.pth", "--out={tmp}/x", "--step=3"], "--step cannot go with --input"),
  ],
)
def test_a_user_s_mistake_is_one_line(flags, words, autoencoder, capsys, tmp_path):
  torch.save(autoencoder.state_dict(), tmp_path / "good.pth")
  (tmp_path / "text.pth").write_text("hello")
  before = sorted(f.name for f in tmp_path.iterdir())
  flags = [flag.replace("{tmp}", str(tmp_path)) for flag in flags]
  error = error_of(convert.main, flags, capsys, beside=True)
  assert words.replace("{tmp}", str(tmp_path)) in error
  assert sorted(f.name for f in tmp_path.iterdir()) == before


def test_nothing_is_left_of_a_run_that_could_not_be_written(autoencoder, tmp_path, monkeypatch):
  torch.save(autoencoder.state_dict(), tmp_path / "good.pth")
  whole = restore.write_run

  def breaks(workdir, *args, **kwargs):
    whole(workdir, *args, **kwargs)
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(restore, "write_run", breaks)
  with pytest.raises(UserError, match="cannot write to .*No space left"):
    convert.main([f"--input={tmp_path / 'good.pth'}", f"--out={tmp_path / 'w'}"])
  assert [f.name for f in tmp_path.iterdir()] == ["good.pth"]
