"""`python -m memkern`."""

import sys

from .cli import main

sys.exit(main())
