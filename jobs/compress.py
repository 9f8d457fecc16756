"""`ray job submit -- python jobs/compress.py RECIPE [--set key=value …]`: the same as `fusegpt
compress`, inside the cluster.
"""

import sys

from fusegpt_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["compress", *sys.argv[1:]]))
