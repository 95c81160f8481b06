"""Gathers the parameters in checkpoints of any engine, whole and in float32: CHECKPOINT OUTPUT pairs."""

import sys
from pathlib import Path

import torch


def whole_parameters(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All parameters by name, float32."""
    if (checkpoint / "model.safetensors").exists():  # DDP
        from safetensors.torch import load_file

        return load_file(checkpoint / "model.safetensors")
    if (checkpoint / "pytorch_model_fsdp_0").exists():  # FSDP2: one file per rank
        from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

        dcp_to_torch_save(checkpoint / "pytorch_model_fsdp_0", checkpoint / "whole.pt")
        return torch.load(checkpoint / "whole.pt", weights_only=True)["model"]
    folder = checkpoint / "pytorch_model"
    if list(folder.glob("*_optim_states.pt")):  # ZeRO-1, 2, 3: float32 master copies, cut over the ranks
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        return get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), tag="pytorch_model")
    return torch.load(folder / "mp_rank_00_model_states.pt", weights_only=False)["module"]  # ZeRO-0


if __name__ == "__main__":
    for source, target in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        parameters = whole_parameters(Path(source))
        torch.save({name: tensor.detach().float().clone() for name, tensor in parameters.items()}, target)
