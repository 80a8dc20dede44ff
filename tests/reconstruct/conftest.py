"""Fixtures of the tests that open pages in a real browser; they alone need playwright."""

import pytest


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory):
    """Where screenshots are kept."""
    from tests.reconstruct.browser import artefacts_folder

    return artefacts_folder(tmp_path_factory.mktemp("screenshots"))


@pytest.fixture(scope="module")
def browser():
    """A running chromium."""
    from tests.reconstruct.browser import chromium

    with chromium() as browser:
        yield browser
