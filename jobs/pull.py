"""`ray job submit -- python jobs/pull.py URI DIR`: the same as `fusegpt pull`, on the node where
the job's entry point runs.
"""

import sys

from fusegpt_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["pull", *sys.argv[1:]]))
