"""Every path flag of every verb, and every path of a config, is read by mmcl_jax.paths."""

import argparse
import os

import pytest
from absl import flags

from common import ROOT
from mistakes import error_of
from mmcl_jax import cli, configuration, train
from mmcl_jax.errors import UserError
from mmcl_jax.support.paths import local

# Flags that are text and no path. A new flag belongs here or is read by `local`.
WORDS = {
  "prepare": {"source", "diseases", "censored", "split", "profile", "beam", "reader"},
  "embed": {"reader"},
  "inspect": {"split"},
  "convert": {"tower", "ecg_profile", "pool", "view", "ignore"},
  "export": {"platforms"},
  "compile": {"topology"},
}
RECIPE = f"--config={ROOT}/configs/joint.py:test"


class Read(Exception):
  """Ends a program when its flags are read."""


@pytest.fixture
def flags_of(monkeypatch):
  """verb -> {flag: its action or parser}, of what is text."""
  seen = []

  def parse(parser, *_):
    seen.append(
      {
        action.dest: action
        for action in parser._actions
        if action.nargs != 0 and action.type in (None, local)
      }
    )
    raise Read

  class Values(flags.FlagValues):
    def __call__(self, argv, known_only=False):
      seen.append({name: self[name].parser for name in self})
      raise Read

  def of(verb):
    seen.clear()
    with monkeypatch.context() as patch:
      if verb in ("train", "compile"):  # what `compile` reads beside is a number
        patch.setattr(configuration.flags, "FlagValues", Values)
      else:
        for name in ("parse_args", "parse_intermixed_args", "parse_known_args"):
          patch.setattr(argparse.ArgumentParser, name, parse)
      with pytest.raises(Read):
        cli.program(verb).main([])
    return seen[0]

  return of


@pytest.mark.reported(
  "--out=~/x made a folder called ~", "gs:// and s3:// were taken for local folders"
)
@pytest.mark.parametrize("verb", cli.PROGRAMS)
def test_every_flag_is_a_path_that_is_read_once_or_a_word(verb, flags_of):
  found = flags_of(verb)
  readers = {
    name: isinstance(one, (configuration.Path, configuration.Recipe))
    or getattr(one, "type", None) is local
    for name, one in found.items()
  }
  assert {name for name, is_path in readers.items() if not is_path} == WORDS.get(verb, set())
  assert any(readers.values())


ADDRESSES = (
  "gs://bucket/x",
  "gs:/bucket/x",
  "s3://bucket/x",
  "https://host/x",
  "hdfs://name/x",
  "file:///x",
  "GS://bucket/x",
  "host:/x",
  "me@host:/x",
  " gs://bucket/x",
)


@pytest.mark.parametrize(
  "path, words",
  [(path, "is an address") for path in ADDRESSES]
  + [
    ("", "expected the name"),
    (" ", "expected the name"),
    ("~no_such_user_here/x", "no user 'no_such_user_here'"),
  ],
)
def test_what_is_no_path_is_refused_in_one_line(path, words):
  with pytest.raises(UserError, match=words) as stop:
    local(path)
  assert "\n" not in str(stop.value)


def test_homes_are_expanded_and_all_else_stays(monkeypatch):
  monkeypatch.setenv("HOME", "/home/of/me")
  assert local("~/x") == "/home/of/me/x" and local("~") == "/home/of/me"
  for path in (
    "x",
    "x/",
    "./x",
    "../x",
    "/x",
    "./~x",
    "x~",
    "a/~/b",
    "./gs:/x",
    "configs/joint.py:demo,arm=mae",
    "v1:2",
    "C:x",
  ):
    assert local(path) == path


COMMANDS = [
  ("prepare", "synthetic --subjects=9 --out={}"),
  ("prepare", "wfdb --input={} --out=c"),
  ("prepare", "wfdb --out=c {}"),
  ("prepare", "ukb --tables x {} --out=c"),
  ("prepare", "ukb --private={} --out=c"),
  ("inspect", "{}"),
  ("train", RECIPE + " --workdir={}"),
  ("train", RECIPE + " --workdir {}"),
  ("train", "--config={} --workdir=w"),
  ("train", RECIPE + " --workdir=w --config.data.cohort={}"),
  ("train", RECIPE + " --workdir=w --config.init_from.ecg={}"),
  ("train", RECIPE + " --workdir=w --config.data.mix=(('c',.1),('{}',.3))"),
  ("compile", RECIPE + " --topology=cpu:1 --config.data.cohort={}"),
  ("evaluate", "--workdir={}"),
  ("evaluate", "--workdir=w --cohort={}"),
  ("compare", "w {} --out=o"),
  ("compare", "w v --out={}"),
  ("convert", "--input={} --out=w"),
  ("convert", "--workdir=w --out={}"),
  ("export", "--workdir=w --out={}"),
  ("embed", "--workdir=w --input x {} --out=o"),
  ("embed", "--workdir=w --input=x --out={}"),
  ("generate", "--workdir=w --input=x --out={}"),
]


@pytest.mark.reported("gs:// and s3:// were taken for local folders")
@pytest.mark.parametrize("verb, command", COMMANDS)
@pytest.mark.parametrize("address", ["gs://bucket/x", "~no_such_user_here/x"])
def test_an_address_ends_a_program_before_it_makes_anything(
  verb, command, address, tmp_path, monkeypatch, capsys
):
  monkeypatch.chdir(tmp_path)
  main = cli.program(verb).main
  error = error_of(main, command.replace("{}", address).split(), capsys)
  assert error.startswith(f"mmcl: error: {address}")
  assert not os.listdir(tmp_path)


def test_a_config_s_paths_are_expanded(monkeypatch):
  monkeypatch.setenv("HOME", "/home/of/me")
  config, _ = configuration.from_flags(
    "mmcl train",
    train.USAGE,
    [
      RECIPE,
      "--workdir=~/w",
      "--config.data.cohort=~/c",
      "--config.init_from.ecg=~/e",
      "--config.data.mix=(('~/m',0.3),)",
    ],
    {"workdir": ""},
  )
  assert (config.data.cohort, config.init_from.ecg, config.data.mix) == (
    "/home/of/me/c",
    "/home/of/me/e",
    (("/home/of/me/m", 0.3),),
  )
