"""The number of examples: a few in `make test`, thousands in `make fuzz`; failed ones are kept and tried first."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

settings.register_profile(
    "drawn",
    max_examples=int(os.environ.get("MEMKERN_EXAMPLES", "40")),
    deadline=None,
    derandomize="MEMKERN_EXAMPLES" not in os.environ,
    print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("drawn")
