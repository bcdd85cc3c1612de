"""The longest files first, so that the processes of `make test` end together."""

LONGEST = ("test_train", "test_fused", "test_decode_attention", "test_rollouts", "test_kernels_step", "test_lag")


def pytest_collection_modifyitems(items):
    place = {stem: number for number, stem in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))
