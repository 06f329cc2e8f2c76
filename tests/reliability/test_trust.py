"""What a stranger's files may do: nothing that they name is run, and no write leaves the folder that was asked for."""

import os

import pytest

from mmcl_jax import files
from mmcl_jax.errors import UserError
from mmcl_jax.training import lock


@pytest.fixture
def victim(tmp_path):
  """A file of the user's that nothing here may touch."""
  file = tmp_path / "mine"
  file.write_text("of value")
  yield file
  assert file.read_text() == "of value"


def make_link(path, victim):
  path.symlink_to(victim)


def make_hard_link(path, victim):
  path.hardlink_to(victim)


def make_dangling(path, victim):
  path.symlink_to(victim.with_name("not there yet"))


def make_pipe(path, victim):
  os.mkfifo(path)


@pytest.mark.reported("a lock that is a symbolic link overwrote the file it points to")
@pytest.mark.parametrize("make", [make_link, make_hard_link, make_dangling, make_pipe])
def test_a_lock_that_leads_elsewhere_is_refused(tmp_path, victim, make):
  (tmp_path / "w").mkdir()
  make(tmp_path / "w/lock", victim)
  with pytest.raises(UserError, match="lock is (a symbolic link|no file of its own).*remove it"), lock.held(str(tmp_path / "w")):
    pass
  assert sorted(os.listdir(tmp_path)) == ["mine", "w"]


@pytest.mark.reported("temporary files with names that can be guessed were written through a link")
@pytest.mark.parametrize("make", [make_link, make_dangling])
def test_a_new_file_takes_the_place_of_a_link(tmp_path, victim, make):
  for planted in ("table", ".table.partial"):
    make(tmp_path / planted, victim)
  with files.replaced(tmp_path / "table") as file:
    file.write("new")
  assert (tmp_path / "table").read_text() == "new" and not (tmp_path / "table").is_symlink()
  assert sorted(os.listdir(tmp_path)) == ["mine", "table"]
