"""`ray job submit -- python jobs/compress_family.py FAMILY [--set key=value …]`: the same as
`fusegpt family`, inside the cluster.
"""

import sys

from fusegpt_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["family", *sys.argv[1:]]))
