"""Tests run outside the source tree: a Python that they start must import the installed package, not the sources."""

import os

import pytest


@pytest.fixture(scope="session", autouse=True)
def outside_the_source_tree(tmp_path_factory):
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("cwd"))
    yield
    os.chdir(before)
