"""`python -m robust_unlearning` is the `unlearn` command."""

import sys

from robust_unlearning.cli.main import main

sys.exit(main())
