"""A fine-tuning with transformers' Trainer like any other, and the lines that make it SRLoRA: marked (1) to (3).

python examples/hf_trainer.py, or accelerate launch examples/hf_trainer.py on several processes.
"""

from __future__ import annotations

import argparse

import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

from srlora_dist import SRLoRACallback, SRLoRAConfig  # (1)
from srlora_dist.tasks.demo import read_splits
from srlora_dist.tasks.sources import MINILM

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", help="a folder or a name on the hub; else the encoder of the demo")
parser.add_argument("--data", help="a CSV file with columns text and labels (0 or 1); else the demo's sentences")
parser.add_argument("--output_dir", default="runs/hf_trainer")
parser.add_argument("--max_steps", type=int, default=160)
parser.add_argument("--save_steps", type=int, default=40)
parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the output folder")
options = parser.parse_args()

name = options.model or str(MINILM.folder())
tokenizer = AutoTokenizer.from_pretrained(name)
data = (
    load_dataset("csv", data_files=options.data)["train"] if options.data else Dataset.from_dict(read_splits()["train"])
)
data = data.map(lambda rows: tokenizer(rows["text"], truncation=True, max_length=128), batched=True)

model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=2)
model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=8, target_modules="all-linear"))

without_gpu = not torch.accelerator.is_available()
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        options.output_dir,
        max_steps=options.max_steps,
        save_steps=options.save_steps,
        save_total_limit=2,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        logging_steps=10,
        report_to=[],
        use_cpu=without_gpu,
    ),
    train_dataset=data,
    processing_class=tokenizer,
    callbacks=[SRLoRACallback(SRLoRAConfig(target_rank=32))],  # (2)
)
trainer.train(resume_from_checkpoint=options.resume or None)
# (3) Without trainer.save_model(): the adapter is in output_dir/adapter.
