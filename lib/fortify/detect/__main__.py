"""python -m fortify.detect slices/: class, confidence and alarm of each slice; see --help."""

import sys

from fortify.detect.command import main

sys.exit(main())
