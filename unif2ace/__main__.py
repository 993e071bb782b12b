"""`python -m unif2ace`, which torchrun can start: the `unif2ace` command."""

import sys

from unif2ace.cli import main

sys.exit(main())
