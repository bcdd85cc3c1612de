"""The longest file first, so that the processes of `make test` end together."""


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem != "test_train")
