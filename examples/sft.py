"""Supervised fine-tuning with TRL's SFTTrainer, and the lines that make it SRLoRA: marked (1) to (3).

pip install trl; then python examples/sft.py. Without --model it makes a small random decoder, so that it runs anywhere.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig
from tokenizers import ByteLevelBPETokenizer
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from srlora_dist import SRLoRACallback, SRLoRAConfig  # (1)
from srlora_dist.tasks.demo import read_splits

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", help="a folder or a name on the hub; else a small random decoder")
parser.add_argument("--data", help="a text file, a sample a line; else the sentences of the demo")
parser.add_argument("--nf4", action="store_true", help="hold the pretrained weights in 4 bits (bitsandbytes)")
parser.add_argument("--output_dir", default="runs/sft")
parser.add_argument("--max_steps", type=int, default=60)
parser.add_argument("--save_steps", type=int, default=20)
parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the output folder")
options = parser.parse_args()


def make_decoder(texts: list[str], folder: Path) -> str:
    """A random Llama of two layers and a tokenizer for these texts, the same every time."""
    if not folder.exists():
        letters = ByteLevelBPETokenizer()
        letters.train_from_iterator(texts, vocab_size=512, special_tokens=["<pad>", "<end>"])
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters._tokenizer, pad_token="<pad>", eos_token="<end>")
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        LlamaForCausalLM(LlamaConfig(vocab_size=512, eos_token_id=1, pad_token_id=0, **sizes)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return str(folder)


data = (
    load_dataset("text", data_files=options.data)["train"]
    if options.data
    else Dataset.from_dict(read_splits()["train"])
)
data = data.select_columns("text")
without_gpu = not torch.accelerator.is_available()
trainer = SFTTrainer(
    model=options.model or make_decoder(data["text"], Path(options.output_dir) / "decoder"),
    args=SFTConfig(
        options.output_dir,
        max_steps=options.max_steps,
        save_steps=options.save_steps,
        save_total_limit=2,
        per_device_train_batch_size=8,
        max_length=64,
        learning_rate=1e-3,
        logging_steps=10,
        report_to=[],
        bf16=not without_gpu,
        use_cpu=without_gpu,
    ),
    train_dataset=data,
    quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4") if options.nf4 else None,
    peft_config=LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=8, target_modules="all-linear"),
    callbacks=[SRLoRACallback(SRLoRAConfig(target_rank=32))],  # (2)
)
trainer.train(resume_from_checkpoint=options.resume or None)
# (3) Without trainer.save_model(): the adapter is in output_dir/adapter.
