"""The longest files first, so that the processes of `make test` end together; a test's own cache; no core files."""

import resource

import pytest

LONGEST = ("test_train", "test_fused", "test_decode_attention", "test_rollouts", "test_kernels_step", "test_lag")

resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))  # of ranks made to crash


@pytest.fixture
def private_cache(tmp_path, monkeypatch):
    """What datasets makes of a file is kept in the test's folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def pytest_collection_modifyitems(items):
    place = {stem: number for number, stem in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))
