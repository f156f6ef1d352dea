# SPDX-License-Identifier: Apache-2.0
"""Everything but the compiled module is declared in pyproject.toml."""

from setuptools import setup

setup(cffi_modules=["spdk_glue/_build.py:builder"], options={"bdist_wheel": {"py_limited_api": "cp311"}})
