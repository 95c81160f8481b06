"""TRL's SFTTrainer without packing: all texts of a micro-batch in one row, without padding."""

from __future__ import annotations

from tests.gallery import sft_lora

PLAIN, RULE, train = sft_lora.PLAIN, sft_lora.RULE, sft_lora.train
LINES = 3  # those of sft_lora.py
sft_lora.PACKING = {"padding_free": True, "max_length": None}
