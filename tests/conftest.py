"""Seeds: fresh ones in every run, named where a test fails; ATTR_TEST_SEED repeats a run, --seeds tries many in one."""

import hashlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # helpers.py and naive.py

# In the environment, so that the workers of pytest-xdist have the same seed.
SEED = int(os.environ.setdefault("ATTR_TEST_SEED", str(int.from_bytes(os.urandom(4), "little"))))

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seeds", type=int, default=1, help="run each test that draws its input so many times")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    count = metafunc.config.getoption("--seeds")
    if count > 1 and "seed" in metafunc.fixturenames:  # rng takes it
        metafunc.fixturenames.append("nth_seed")
        metafunc.parametrize("nth_seed", range(count))


def pytest_report_header() -> str:
    return f"ATTR_TEST_SEED={SEED}"


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A seed of the test's own."""
    digest = hashlib.blake2b(f"{SEED}:{request.node.nodeid}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") >> 1


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture
def measured(record_property: Callable[[str, object], None]) -> Callable[[object, float], None]:
    """Keep a measured number; ``--junitxml`` writes them out."""
    return lambda name, value: record_property(str(name), float(value))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = yield
    if report.failed:
        report.sections.append(("seed", f"repeat with ATTR_TEST_SEED={SEED}"))
    return report
