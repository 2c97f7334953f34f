"""Hold a shard of a run folder until the standard input ends: ``lock_holder.py FOLDER i/n``."""

from __future__ import annotations

import sys
from pathlib import Path

from monai_adv.studies.lock import run_lock
from monai_adv.studies.shards import Shard

if __name__ == "__main__":
    with run_lock(Path(sys.argv[1]), Shard.parse(sys.argv[2])):
        print("held", flush=True)
        sys.stdin.read()
