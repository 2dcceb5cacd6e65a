from __future__ import annotations

import pytest

from tests.io.peers import Credentials, make_credentials


@pytest.fixture(scope="session")
def credentials(tmp_path_factory: pytest.TempPathFactory) -> Credentials:
    """A CA and a certificate for localhost."""
    return make_credentials(tmp_path_factory.mktemp("tls"))
