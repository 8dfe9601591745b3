"""`python -m tutorial_sae`."""

import sys

from tutorial_sae.cli import main

sys.exit(main())
