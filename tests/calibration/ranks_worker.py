"""One process of a calibration: `python -m torch.distributed.run ... ranks_worker.py OUT MODELS NAME METHOD`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch import distributed

sys.path.insert(0, str(Path(__file__).parents[2]))

from bitdistiller_peft.calibration import calibrate
from tests.calibration.models import IDS, student


def main(out: Path, models: Path, name: str, method: str) -> None:
    """Calibrate, compare with the other process, and save what is packed."""
    torch.set_num_threads(1)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        distributed.init_process_group("gloo")
    model = student(models, name)
    ran: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: ran.append(len(args[0])))
    calibrate(model, None, IDS, method=method, batch_size=1, show_progress=False)
    packed = model.pack_and_unload(progressbar=False)
    if distributed.is_initialized():
        for name, tensor in packed.state_dict().items():
            seen = [torch.empty_like(tensor) for _ in range(distributed.get_world_size())]
            distributed.all_gather(seen, tensor)
            if not all(torch.equal(tensor, other) for other in seen):
                raise SystemExit(f"the processes differ in {name}")
    if int(os.environ.get("RANK", "0")) == 0:
        packed.save_pretrained(out / "packed")
        (out / "ran").write_text(str(len(ran)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
