"""`python -m lit_personalize` is `litp`."""

import sys

from lit_personalize.cli.main import main

sys.exit(main())
