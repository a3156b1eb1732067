"""python -m fortify.leakage my-images: the leak meter on any folder with one subfolder a class."""

import sys

from fortify.leakage.meter import main

sys.exit(main())
