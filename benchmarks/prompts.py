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
                         ("embedding.weight", "rows")):
        name = name.replace(theirs, ours)
    return name


lora.plain_name = plain_name
lora.PAIRS.clear()
for method, config in (("prefix", PrefixTuningConfig), ("prompt", PromptTuningConfig)):
    theirs = partial(get_peft_model, peft_config=config(task_type="SEQ_CLS", num_virtual_tokens=20))
    lora.PAIRS[method] = lora.Pair(partial(attach, method=method, tokens=20), theirs, 1.00, 1.00)

if __name__ == "__main__":
    torch.manual_seed(0)
    bench.parts("prompts", __doc__, lora.PARTS, lora.render)
