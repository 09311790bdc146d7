"""What the tests of the page share: a concept file, and the embedded model loaded once."""

import pytest


@pytest.fixture(scope="session")
def concept_file(finetuned, tmp_path_factory):
    """A concept that differs from its base, as a file in a run folder: logs/RUN/concept.safetensors."""
    _, concept = finetuned
    folder = tmp_path_factory.mktemp("page") / "logs/2026-01-01T00-00-00_cat"
    folder.mkdir(parents=True)
    concept.save(folder / "concept.safetensors")
    return folder / "concept.safetensors"


@pytest.fixture(scope="session")
def studio():
    from dci.app.studio import Studio, Weights

    return Studio(Weights())


@pytest.fixture
def shelf(studio, concept_file):
    from dci.app.shelf import Shelf

    return Shelf(studio.read, [], concept_file.parent.parent)
