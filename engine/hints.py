"""What a word was meant to be: a setting misspelt, or its name in another trainer (TRL, verl, OpenRLHF)."""

import difflib
from collections.abc import Iterable

ELSEWHERE = {
    "algo": "algorithm trainer adv_estimator advantage_estimator loss_type",
    "name": "run_name experiment_name exp_name",
    "out": "output_dir output_path save_dir save_path logging_dir default_local_dir ckpt_dir",
    "seed": "random_seed data_seed",
    "steps": "max_steps num_steps total_steps train_steps total_training_steps max_train_steps num_iters max_iters "
    "num_train_epochs num_epochs total_epochs max_epochs num_episodes",
    "resume": "checkpoint checkpoint_path resume_from_checkpoint resume_from resume_mode load_checkpoint",
    "model": "model_name_or_path model_name model_path model_id base_model pretrain pretrained_model",
    "kernels": "use_liger_kernel use_liger_loss",
    "train_data": "data_dir dataset dataset_name dataset_path data data_path train_file train_files train_dataset "
    "prompt_data",
    "test_data": "eval_dataset eval_data val_data val_file val_files validation_file test_file test_files",
    "prompt_column": "prompt_key input_key question_column question_key",
    "answer_column": "answer_key label_key label_column solution_column ground_truth_column",
    "trace_column": "response_key response_column output_key completion_column",
    "chosen_column": "chosen_key field_chosen",
    "rejected_column": "rejected_key field_rejected",
    "system_prompt": "system system_message",
    "train_limit": "max_samples max_train_samples train_max_samples",
    "eval_size": "max_eval_samples val_max_samples num_eval_samples",
    "max_prompt_tokens": "max_prompt_length max_prompt_len prompt_max_len prompt_length max_input_length",
    "rewards": "reward reward_func reward_funcs reward_fn reward_function reward_functions reward_weights",
    "prompts_per_step": "batch_size train_batch_size global_batch_size rollout_batch_size generation_batch_size "
    "gradient_accumulation_steps grad_accum accumulate_grad_batches num_prompts",
    "group_size": "num_generations n_samples_per_prompt samples_per_prompt num_return_sequences rollout_n n",
    "max_new_tokens": "max_tokens max_completion_length max_response_length response_length generate_max_len "
    "max_gen_len max_completion_tokens max_length max_len max_model_len max_seq_length max_seq_len seq_len seq_length "
    "cutoff_len block_size",
    "temperature": "temp sampling_temperature",
    "stop": "stop_strings stop_sequences stop_words",
    "lag": "staleness max_staleness off_policy_steps",
    "dynamic_sampling": "filter_groups",
    "overlong_buffer": "overlong_buffer_len overlong_buffer_cfg soft_overlong_punishment soft_punish_cache",
    "beta": "kl_coef kl_coeff kl_loss_coef init_kl_coef kl_penalty kl_weight kl_beta",
    "clip_low": "epsilon epsilon_low clip_ratio clip_ratio_low clip_range cliprange cliprange_low eps_clip",
    "clip_high": "epsilon epsilon_high clip_ratio clip_ratio_high clip_range cliprange cliprange_high eps_clip",
    "dual_clip": "clip_ratio_c delta",
    "entropy_coef": "entropy_coeff ent_coef entropy_loss_coef entropy_bonus",
    "importance_cap": "vllm_importance_sampling_cap tis_imp_ratio_cap",
    "importance_mask": "icepop token_mask vllm_importance_sampling_clip_min vllm_importance_sampling_clip_max",
    "reference": "ref_model ref_model_path precompute_ref_log_probs reference_model ref_policy",
    "preference": "loss_type pref_loss dpo_loss_type",
    "label_smoothing": "dpo_label_smoothing",
    "length_normalised": "sigmoid_norm length_normalized simpo",
    "nll_coef": "rpo_alpha pref_ftx sft_weight nll_loss_coef",
    "pairs_per_step": "batch_size train_batch_size global_batch_size gradient_accumulation_steps",
    "teacher": "teacher_model teacher_model_name_or_path teacher_path",
    "shots": "num_fewshot few_shot n_shots k_shot num_shots",
    "context": "fewshot zeroshot shuffled_answers",
    "match_coef": "lambda lmbda alpha distill_weight kd_ratio",
    "match_top_k": "top_logprobs teacher_top_k num_logits loss_top_k",
    "tau_pos": "sapo_temperature_pos",
    "tau_neg": "sapo_temperature_neg",
    "updates_per_rollout": "steps_per_generation num_mini_batches mini_batch_size ppo_mini_batch_size",
    "epochs": "ppo_epochs num_ppo_epochs num_iterations",
    "lr": "learning_rate actor_learning_rate",
    "betas": "beta1 beta2 adam_beta1 adam_beta2 adam_betas",
    "eps": "adam_epsilon adam_eps",
    "schedule": "scheduler lr_scheduler lr_scheduler_type lr_schedule",
    "warmup_steps": "warmup warmup_ratio num_warmup_steps lr_warmup_steps",
    "min_lr_ratio": "min_lr",
    "max_grad_norm": "max_norm grad_clip clip_grad gradient_clipping gradient_clip_val",
    "step_tokens": "batch_size train_batch_size global_batch_size gradient_accumulation_steps pack_length "
    "rows_per_step",
    "micro_tokens": "batch_size micro_batch micro_batch_size per_device_train_batch_size per_device_batch_size "
    "micro_train_batch_size train_micro_batch_size_per_gpu ppo_micro_batch_size_per_gpu max_tokens_per_gpu",
    "activation_checkpointing": "gradient_checkpointing enable_gradient_checkpointing grad_checkpointing",
    "cpu_offload": "offload param_offload optimizer_offload adam_offload",
    "compile": "torch_compile",
    "lora_rank": "r rank lora lora_r peft_lora_r peft_config lora_dim adapter_rank use_peft use_lora",
    "lora_alpha": "peft_lora_alpha",
    "lora_targets": "lora_target_modules target_modules lora_target",
    "export": "merge_lora merge_adapter",
    "eval_every": "val_every eval_steps eval_interval eval_freq test_freq eval_strategy",
    "save_every": "save_steps save_interval save_freq save_strategy",
    "keep": "save_total_limit max_checkpoints max_ckpt_to_keep",
    "tensorboard": "report_to use_tensorboard",
    "wandb": "report_to use_wandb wandb_mode",
    "num_samples": "log_completions num_completions_to_print",
}
OURS: dict[str, list[str]] = {}
"""Names of other trainers -> the settings that may be meant."""
for _name, _others in ELSEWHERE.items():
    for _other in _others.split():
        OURS.setdefault(_other, []).append(_name)


def nearest(word: str, known: Iterable[str]) -> str:
    """' Did you mean X?' for the closest known word in any case, or '' when none is close."""
    by_lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), list(by_lower), n=1)
    return f" Did you mean {by_lower[close[0]]!r}?" if close else ""


def setting_meant(key: str, settings: Iterable[str]) -> str:
    """As `nearest`, for what should be a setting, whose name may be another trainer's, or a path to it as a.b.c."""
    word, meant = key.rpartition(".")[2].lower(), OURS | {name: [name] for name in settings}
    close = difflib.get_close_matches(word, meant, n=1, cutoff=0.85)
    close = close or difflib.get_close_matches(word, settings, n=1, cutoff=0.75)
    return f" Did you mean {' or '.join(map(repr, meant[close[0]]))}?" if close else ""
