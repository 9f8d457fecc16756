"""`ray job submit -- python jobs/compare.py RECIPE [--set key=value …]`: the same as `fusegpt
compare`, inside the cluster.
"""

import sys

from fusegpt_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["compare", *sys.argv[1:]]))
