"""The skip rule of conftest.py, tried on small suites that pytest runs inside a test."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

SUITE = """
import unittest
import pytest

def test_passes():
    pass

def test_skips_inside():
    pytest.skip("no network")

@pytest.mark.skip(reason="not today")
def test_marked():
    pass

@pytest.mark.skipif(True, reason="wrong system")
def test_conditional():
    pass

@pytest.fixture
def missing():
    pytest.skip("nothing to give")

def test_fixture_skips(missing):
    pass

@pytest.mark.parametrize("case", [])
def test_without_cases(case):
    pass

class TestOld(unittest.TestCase):
    def test_unittest_skip(self):
        self.skipTest("old style")
"""
REASONS = ["no network", "not today", "wrong system", "nothing to give", "empty parameter set", "old style"]


@pytest.fixture
def suite(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A suite under this project's conftest.py; each test below says whether skips are forbidden."""
    monkeypatch.delenv("TUTORIAL_SAE_NO_SKIP", raising=False)
    # The inner runs need no plugin but pytest's own, and loading the others takes most of the time.
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    pytester.makeconftest((Path(__file__).parent / "conftest.py").read_text(encoding="utf-8"))
    return pytester


def test_skips_are_skips_without_the_variable(suite: pytest.Pytester):
    suite.makepyfile(SUITE)
    result = suite.runpytest()
    result.assert_outcomes(passed=1, skipped=len(REASONS))
    assert result.ret == 0


def test_only_1_forbids_skips(suite: pytest.Pytester, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TUTORIAL_SAE_NO_SKIP", "0")
    suite.makepyfile(SUITE)
    assert suite.runpytest().ret == 0


def test_every_kind_of_skip_fails_and_names_its_reason(suite: pytest.Pytester, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TUTORIAL_SAE_NO_SKIP", "1")
    suite.makepyfile(SUITE)
    result = suite.runpytest()
    outcomes = result.parseoutcomes()
    assert outcomes.get("passed") == 1
    assert "skipped" not in outcomes
    # pytest counts what fails before the test's own body as an error.
    assert outcomes.get("failed", 0) + outcomes.get("errors", 0) == len(REASONS)
    assert result.ret == 1
    text = result.stdout.str()
    assert all(reason in text for reason in REASONS)


@pytest.mark.parametrize(
    "module",
    [
        "import pytest\npytest.skip('whole file', allow_module_level=True)\n",
        "import pytest\npytest.importorskip('no_such_module_anywhere')\ndef test_never():\n    pass\n",
    ],
    ids=["skip", "importorskip"],
)
def test_a_skipped_module_fails(suite: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, module: str):
    monkeypatch.setenv("TUTORIAL_SAE_NO_SKIP", "1")
    suite.makepyfile(test_skipped=module, test_good="def test_passes():\n    pass\n")
    result = suite.runpytest()
    assert result.ret != 0
    assert result.parseoutcomes().get("errors") == 1


def test_a_missing_gpu_may_skip(suite: pytest.Pytester, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TUTORIAL_SAE_NO_SKIP", "1")
    suite.makepyfile(
        test_gpu="""
        import pytest

        @pytest.mark.skip(reason="GPU: none here")
        def test_on_gpu():
            pass

        @pytest.mark.skip(reason="needs a GPU")
        def test_reason_starts_otherwise():
            pass
        """
    )
    outcomes = suite.runpytest().parseoutcomes()
    assert outcomes.get("skipped") == 1
    assert outcomes.get("errors", 0) + outcomes.get("failed", 0) == 1


def test_an_expected_failure_is_no_skip(suite: pytest.Pytester, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TUTORIAL_SAE_NO_SKIP", "1")
    suite.makepyfile("import pytest\n@pytest.mark.xfail\ndef test_known():\n    assert False\n")
    result = suite.runpytest()
    result.assert_outcomes(xfailed=1)
    assert result.ret == 0
