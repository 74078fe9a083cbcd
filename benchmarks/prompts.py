"""A training step of MiniLM behind a prefix and behind a prompt, ours and peft's, against every weight trained: CPU time and peak memory.

    OMP_NUM_THREADS=1 python benchmarks/prompts.py                 # about five minutes
    OMP_NUM_THREADS=1 python benchmarks/prompts.py --only "16 x 32" memory

Writes the tables into benchmarks/README.md; lora.py holds the parts and the rules of measuring.
"""

from functools import partial

import bench
import lora
import torch
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model

from tunebook.tuning.methods import attach


def plain_name(name: str) -> str:
    """A parameter's name in both libraries."""
    for theirs, ours in (("base_model.", ""), ("modules_to_save.", ""), ("prompt_encoder", "virtual"), (".default", ""), ("_default", ""),
                         ("transform", "encoder"), ("embedding.weight", "rows")):
        name = name.replace(theirs, ours)
    return name


def pair(config: type, method: str, **settings: bool) -> lora.Pair:
    """20 virtual tokens in both libraries; ours may not be slower."""
    theirs = config(task_type="SEQ_CLS", num_virtual_tokens=20, **{"prefix_projection": True} if settings else {})
    return lora.Pair(partial(attach, method=method, tokens=20, **settings), partial(get_peft_model, peft_config=theirs), 1.00, 1.00)


lora.plain_name = plain_name
lora.PAIRS.clear()
lora.PAIRS |= {"prefix": pair(PrefixTuningConfig, "prefix"), "prefix made by an MLP": pair(PrefixTuningConfig, "prefix", mlp=True),
               "prompt": pair(PromptTuningConfig, "prompt")}

if __name__ == "__main__":
    torch.manual_seed(0)
    bench.parts("prompts", __doc__, lora.PARTS, lora.render)
