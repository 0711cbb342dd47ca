"""One rank: runs a check of `checks.py` by name, and writes what came of it; ends without waiting for anybody."""

import json
import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import robustkern as rk

check, rank, size, folder, seconds = (
    sys.argv[1],
    int(sys.argv[2]),
    int(sys.argv[3]),
    Path(sys.argv[4]),
    float(sys.argv[5]),
)
torch.set_num_threads(1)
rk.set_num_threads(1)
found = {"error": None, "value": None}
try:
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(folder / "store"), size),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=seconds),
    )
    os.environ["RANKS_FOLDER"] = str(folder)
    import checks

    found["value"] = getattr(checks, check)(rank, size)
except BaseException:
    found["error"] = traceback.format_exc()
(folder / f"{rank}.json").write_text(json.dumps(found))
sys.stdout.flush()
if found["error"] is None and not check.startswith("killed"):
    dist.barrier()
os._exit(0)  # torch's own FSDP2 on gloo aborts at exit now and then
