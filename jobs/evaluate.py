"""`ray job submit -- python jobs/evaluate.py MODEL… --data … --length …`: `fusegpt evaluate` on the
cluster's replicas.
"""

import sys

from fusegpt_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", "--engine", "ray", *sys.argv[1:]]))
