"""`python -m sparse_pathways.cli`: the command, for launchers such as torchrun."""

import sys

from sparse_pathways.cli import main

sys.exit(main())
