"""Contract suites: what every storage tier, cache policy, file format and update source has to do, as classes of pytest tests.

Subclass a suite in a test file and name the class to test::

    from hps_numba.testing import TierContract
    from my_package import MyTier

    class TestMyTier(TierContract):
        tier = MyTier

The built-in plugins are tested by the same classes. Needs pytest (``pip install hps-numba[test]``).
"""

import pytest

for _name in ("_rows", "tiers", "policies", "formats", "sources"):
    pytest.register_assert_rewrite(f"{__name__}.{_name}")  # so that a failed assertion shows its values

from hps_numba.testing.formats import FormatContract  # noqa: E402
from hps_numba.testing.policies import PolicyContract  # noqa: E402
from hps_numba.testing.sources import SourceContract  # noqa: E402
from hps_numba.testing.tiers import TierContract  # noqa: E402

__all__ = ["FormatContract", "PolicyContract", "SourceContract", "TierContract"]
