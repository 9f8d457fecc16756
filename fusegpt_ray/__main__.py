"""`python -m fusegpt_ray` is `fusegpt`."""

import sys

from fusegpt_ray.cli import main

if __name__ == "__main__":
    sys.exit(main())
