"""What pyproject.toml cannot say: the recipes in configs/ are installed as mmcl_jax.configs."""

from setuptools import find_packages, setup

setup(
  packages=[*find_packages(include=["mmcl_jax*"]), "mmcl_jax.configs"],
  package_dir={"mmcl_jax.configs": "configs"},
)
