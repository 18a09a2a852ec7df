"""Keys of other trainers, with ours: Flower, OpenFedLLM, FederatedScope, PEFT, TRL, axolotl.

What has no key here is answered with the reason. Needs no torch.
"""

from __future__ import annotations

_NO_4_BIT = (
    "no quantised backbone; backbone.sharding=zero3 stores it once over all processes, and "
    "backbone.offload=cpu in host memory"
)
_BATCH = "train.batch_size is the batch of an optimizer step, train.micro_batch_size of a pass"
_CLIENTS_PER_ROUND = "federated.clients_per_round (a number of clients, not a fraction)"
_WARMUP = "train.warmup_rounds (in rounds)"
_EVERY = "evaluation.every_rounds (in rounds)"

FOREIGN_KEYS = {
    # federated
    "strategy": "federated.method",
    "fed_alg": "federated.method",
    "aggregation": "federated.method",
    "aggregator": "federated.method",
    "num_server_rounds": "federated.num_rounds",
    "total_round_num": "federated.num_rounds",
    "global_rounds": "federated.num_rounds",
    "communication_rounds": "federated.num_rounds",
    "comm_rounds": "federated.num_rounds",
    "rounds": "federated.num_rounds",
    "num_supernodes": "federated.num_clients",
    "client_num": "federated.num_clients",
    "n_clients": "federated.num_clients",
    "fraction_train": _CLIENTS_PER_ROUND,
    "fraction_fit": _CLIENTS_PER_ROUND,
    "sample_fraction": _CLIENTS_PER_ROUND,
    "client_fraction": _CLIENTS_PER_ROUND,
    "sample_clients": "federated.clients_per_round",
    "sample_client_num": "federated.clients_per_round",
    "min_fit_clients": "federated.clients_per_round",
    "local_update_steps": "train.local_steps",
    "local_updates": "train.local_steps",
    "local_ep": "train.local_epochs",
    "prox_mu": "no proximal term (FedProx)",
    "proximal_mu": "no proximal term (FedProx)",
    "split_strategy": "partition.kind",
    "dirichlet_alpha": "partition.concentration",
    # optimizer and schedule
    "learning_rate": "train.lr",
    "lr_scheduler_type": "train.schedule",
    "lr_scheduler": "train.schedule",
    "warmup_steps": _WARMUP,
    "warmup_ratio": _WARMUP,
    "optim": "train.optimizer",
    "gradient_clipping": "train.max_grad_norm",
    "max_steps": "train.local_steps (of a client and round) and federated.num_rounds",
    "num_train_epochs": "train.local_epochs (of a client and round) and federated.num_rounds",
    "num_epochs": "train.local_epochs (of a client and round) and federated.num_rounds",
    "epochs": "train.local_epochs (of a client and round) and federated.num_rounds",
    "per_device_train_batch_size": _BATCH,
    "gradient_accumulation_steps": _BATCH,
    "train_batch_size": _BATCH,
    "per_device_eval_batch_size": "evaluation.batch_size",
    # model and adapters
    "base_model": "model.name",
    "model_name_or_path": "model.name",
    "pretrained_model_name_or_path": "model.name",
    "torch_dtype": "model.dtype",
    "bf16": "model.dtype=bf16",
    "fp16": "no fp16; model.dtype=bf16",
    "load_in_4bit": _NO_4_BIT,
    "load_in_8bit": _NO_4_BIT,
    "quantization": _NO_4_BIT,
    "attn_implementation": "model.attention",
    "flash_attention": "model.attention=flash_attention_2",
    "r": "lora.rank",
    "lora_r": "lora.rank",
    "peft_lora_r": "lora.rank",
    "lora_rank": "lora.rank",
    "lora_alpha": "lora.alpha",
    "peft_lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_target_modules": "lora.target_modules",
    "lora_target_linear": "lora.target_modules=all-linear",
    "use_rslora": "lora.scaling=rslora",
    "loraplus_lr_ratio": "train.loraplus_ratio",
    "init_lora_weights": "lora.init",
    # data
    "dataset": "data.task, or data.train_files for files of your own",
    "datasets": "data.train_files",
    "dataset_name": "data.task, or data.train_files for files of your own",
    "data_path": "data.train_files",
    "train_file": "data.train_files",
    "validation_file": "data.eval_files",
    "test_datasets": "data.eval_files",
    "val_set_size": "data.eval_fraction",
    "max_length": "data.max_tokens",
    "max_seq_length": "data.max_tokens",
    "max_seq_len": "data.max_tokens",
    "sequence_len": "data.max_tokens",
    "seq_length": "data.max_tokens",
    "cutoff_len": "data.max_tokens",
    "sample_packing": "data.packing",
    # outputs
    "output_dir": "output.dir and output.name",
    "run_name": "output.name",
    "save_steps": "output.checkpoint_every_rounds (in rounds)",
    "save_model_freq": "output.checkpoint_every_rounds (in rounds)",
    "save_total_limit": "output.keep_checkpoints",
    "eval_steps": _EVERY,
    "eval_strategy": _EVERY,
    "evaluation_strategy": _EVERY,
    "resume_from_checkpoint": "output.resume",
    "report_to": "output.trackers",
    "wandb_project": "output.trackers=wandb, and WANDB_PROJECT in the environment",
    "use_wandb": "output.trackers=wandb",
}
"""Last part of another trainer's key, and our key or the reason why there is none."""
