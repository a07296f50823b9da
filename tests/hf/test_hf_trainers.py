"""Trainers and adapters of other libraries: resuming, prefix tuning, supervised and preference training, offloading."""

import subprocess
import sys
import warnings

import datasets
import pytest
import torch
import trl
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from torch.utils.data import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, Trainer, TrainingArguments

from implicit_attention.hf import (
    ImplicitAttentionConfig,
    ImplicitAttentionForCausalLM,
    ImplicitAttentionForMaskedLM,
    ImplicitAttentionForQuestionAnswering,
    ImplicitAttentionForSequenceClassification,
    ImplicitAttentionForTokenClassification,
)
from tests.hf import tiny

# Of peft and trl, which lag behind transformers' names.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore:.*:UserWarning")
MIXED = {"layer_types": ["implicit", "attention"], "pad_token_id": 0, "dtype": torch.float32}


class Rows(Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, i):
        row = tiny.tokens(1, 12, seed=i)[0]
        return {"input_ids": row, "labels": row}


def test_trainer_resumes(tmp_path):
    def trained(steps, resume, folder):
        settings = TrainingArguments(
            folder, max_steps=steps, save_steps=2, per_device_train_batch_size=2, report_to="none", use_cpu=True,
            disable_tqdm=True, seed=3, lr_scheduler_type="constant",
        )  # fmt: skip
        trainer = Trainer(tiny.make(**MIXED).train(), settings, train_dataset=Rows())
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model

    whole = trained(4, None, tmp_path / "whole")
    trained(2, None, tmp_path / "parts")
    resumed = trained(4, True, tmp_path / "parts")
    for name, parameter in whole.named_parameters():
        torch.testing.assert_close(resumed.get_parameter(name), parameter, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("wrapped", [False, True], ids=["model", "adapter"])
def test_label_smoothing_predicts_the_next_token(tmp_path, wrapped):
    """Trainer takes the logits itself, and shifts labels only for models that it knows as language models."""
    model, epsilon, tokens = tiny.make(**MIXED), 0.1, tiny.tokens()
    if wrapped:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["W_K"]))
    arguments = TrainingArguments(tmp_path, label_smoothing_factor=epsilon, use_cpu=True, report_to="none")
    found = Trainer(model, arguments).compute_loss(model, {"input_ids": tokens, "labels": tokens})
    log_p = model(tokens).logits[:, :-1].log_softmax(-1)
    hit = -log_p.gather(-1, tokens[:, 1:, None]).mean()
    torch.testing.assert_close(found, (1 - epsilon) * hit - epsilon * log_p.mean())


@pytest.mark.parametrize(
    ("cls", "labels"),
    [
        (ImplicitAttentionForCausalLM, ["labels"]),
        (ImplicitAttentionForMaskedLM, ["labels"]),
        (ImplicitAttentionForSequenceClassification, ["labels"]),
        (ImplicitAttentionForTokenClassification, ["labels"]),
        (ImplicitAttentionForQuestionAnswering, ["start_positions", "end_positions"]),
    ],
)
def test_trainer_evaluates(tmp_path, cls, labels):
    """Without every argument that is called a label, Trainer leaves out loss and metrics, and says nothing."""
    causal = {} if cls is ImplicitAttentionForCausalLM else {"is_causal": False}
    model = tiny.make(cls, num_labels=2, **MIXED | causal)
    one = cls in (ImplicitAttentionForSequenceClassification, ImplicitAttentionForQuestionAnswering)
    rows = [{"input_ids": row} | dict.fromkeys(labels, torch.tensor(1) if one else row % 2) for row in tiny.tokens(4)]
    arguments = TrainingArguments(tmp_path, use_cpu=True, report_to="none")
    trainer = Trainer(model, arguments, eval_dataset=rows, compute_metrics=lambda found: {"seen": len(found.label_ids)})
    found, batch = trainer.evaluate(), torch.utils.data.default_collate(rows)
    assert found["eval_loss"] == pytest.approx(float(model(**batch).loss), rel=1e-5)
    assert found["eval_seen"] == (4 if len(labels) == 1 else 2)
    assert trainer.predict(rows).label_ids is not None


def test_trainer_keeps_the_columns_that_models_read(tmp_path):
    """Trainer drops what `forward` does not name, and `position_ids` say where packed documents begin."""
    ids, positions = tiny.tokens(1, 8)[0].tolist(), [0, 1, 2, 3, 4, 0, 1, 2]
    rows = datasets.Dataset.from_list([{"input_ids": ids, "labels": ids, "position_ids": positions, "source": "a"}] * 2)
    model = tiny.make(**MIXED)
    arguments = TrainingArguments(tmp_path, use_cpu=True, report_to="none", per_device_train_batch_size=2)
    batch = next(iter(Trainer(model, arguments, train_dataset=rows).get_train_dataloader()))
    assert set(batch) == {"input_ids", "labels", "position_ids"}
    alone = [model(batch["input_ids"][:1, part]).logits for part in (slice(0, 5), slice(5, 8))]
    torch.testing.assert_close(model(**batch).logits[:1], torch.cat(alone, 1), atol=1e-5, rtol=1e-4)


def test_what_is_saved_is_a_configuration_of_transformers(tmp_path):
    """Its trainer and its tokenizers read config.json with the base class, which knows no "implicit"."""
    tiny.config(layer_types=["implicit", "attention"]).save_pretrained(tmp_path)
    saved = PreTrainedConfig.from_json_file(tmp_path / "config.json")
    assert saved.block_types == ["implicit", "full_attention"]
    assert "layer_types" not in saved.to_dict()


def test_old_name_of_block_types(tmp_path):
    config = tiny.config(layer_types=["implicit", "attention"])
    assert config.layer_types == config.block_types == ["implicit", "full_attention"]
    saved = config.to_dict()
    saved["layer_types"] = saved.pop("block_types")  # as 0.1.0 saved it
    assert ImplicitAttentionConfig.from_dict(saved).block_types == ["implicit", "full_attention"]
    with pytest.raises(ValueError, match="`layer_types` must be None next to block_types"):
        tiny.config(layer_types=["implicit"] * 2, block_types=["attention"] * 2)


def test_unknown_fields_of_a_saved_configuration(tmp_path):
    model = tiny.make(**MIXED)
    model.config.pretraining_tp = 1
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="does not know: `pretraining_tp`. They are kept and have no effect"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.pretraining_tp == 1
    with pytest.warns(UserWarning, match="`pretraining_tp`"):
        ImplicitAttentionConfig(**model.config.to_dict())
    with pytest.raises(ValueError, match="`pretraining_tp`"):
        ImplicitAttentionConfig(pretraining_tp=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AutoConfig.for_model("implicit_attention", hidden_size=64)


def test_a_process_that_does_not_know_the_models_names_them(tmp_path):
    tiny.make(**MIXED).save_pretrained(tmp_path)
    code = f"from transformers import AutoConfig; AutoConfig.from_pretrained({str(tmp_path)!r})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert "`implicit_attention`" in out.stderr


@pytest.mark.parametrize("options", [MIXED, MIXED | {"num_kv_heads": 2}], ids=["heads", "groups"])
def test_prefix_tuning(options):
    model = tiny.make(**options)
    assert model.config.num_key_value_heads == options.get("num_kv_heads", 4)
    tuned, tokens = (
        get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
        tiny.tokens(),
    )
    tuned.eval()
    assert (tuned(tokens).logits - model(tokens).logits).abs().max() > 1e-3
    found, length = tuned.generate(input_ids=tokens, max_new_tokens=3, do_sample=False), tokens.shape[1]
    for i in range(3):  # the prefix is seen at every step
        logits = tuned(found[:, : length + i]).logits[:, -1]
        assert torch.equal(logits.argmax(-1), found[:, length + i])


def test_lora_with_a_compiled_static_cache():
    """The adapter's map is part of the compiled step."""
    config = LoraConfig(r=2, target_modules=["Omega_Q", "W_K"], init_lora_weights=False)
    model = get_peft_model(tiny.make(**MIXED), config).eval()
    tokens, settings = tiny.tokens(2, 5), {"max_new_tokens": 4, "do_sample": False}
    expected = model.generate(input_ids=tokens, use_cache=False, **settings)
    assert torch.equal(model.generate(input_ids=tokens, cache_implementation="static", **settings), expected)


@pytest.mark.parametrize("place", ["disk", "cpu"])
def test_offloaded_blocks(tmp_path, place):
    model, tokens = tiny.make(dtype=torch.float32, layer_types=["attention", "implicit"], num_kv_heads=2), tiny.tokens()
    model.save_pretrained(tmp_path / "model")
    where = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.layers.0": "cpu",
             "model.layers.1": place}  # fmt: skip
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=where, offload_folder=tmp_path / "offload"
    )
    for _ in range(2):
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    settings = {"max_new_tokens": 3, "do_sample": False}
    assert torch.equal(loaded.generate(tokens, **settings), model.generate(tokens, **settings))


def test_supervised_training_on_packed_rows(tmp_path):
    rows = datasets.Dataset.from_list([{"input_ids": tiny.tokens(1, 3 + i % 5, seed=i)[0].tolist()} for i in range(16)])
    settings = trl.SFTConfig(
        str(tmp_path), max_steps=2, packing=True, padding_free=True, max_length=16, report_to="none", use_cpu=True,
        disable_tqdm=True, per_device_train_batch_size=1, dataset_kwargs={"skip_prepare_dataset": False},
        pad_token="<pad>", eos_token="<eos>", bf16=False,
    )  # fmt: skip
    trainer = trl.SFTTrainer(tiny.make(**MIXED).train(), settings, train_dataset=rows, processing_class=tokenizer())
    assert "position_ids" in next(iter(trainer.get_train_dataloader()))
    assert trainer.train().training_loss > 0


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {chr(97 + i): 3 + i for i in range(26)}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def test_preference_training(tmp_path):
    rows = datasets.Dataset.from_list([{"prompt": "a b", "chosen": " c d", "rejected": " e"}] * 8)
    common = {"max_steps": 2, "report_to": "none", "use_cpu": True, "disable_tqdm": True, "bf16": False}
    trainer = trl.DPOTrainer(
        tiny.make(**MIXED).train(), tiny.make(**MIXED), train_dataset=rows, processing_class=tokenizer(),
        args=trl.DPOConfig(str(tmp_path / "dpo"), **common),
    )  # fmt: skip
    assert trainer.train().training_loss > 0


def test_reward_training(tmp_path):
    from implicit_attention.hf import ImplicitAttentionForSequenceClassification

    rows = datasets.Dataset.from_list([{"prompt": "a b", "chosen": " c d", "rejected": " e"}] * 8)
    settings = trl.RewardConfig(
        str(tmp_path), max_steps=2, report_to="none", use_cpu=True, disable_tqdm=True, bf16=False
    )
    model = tiny.make(ImplicitAttentionForSequenceClassification, num_labels=1, **MIXED).train()
    trainer = trl.RewardTrainer(model, args=settings, train_dataset=rows, processing_class=tokenizer())
    assert trainer.train().training_loss > 0


def test_the_class_is_registered():
    assert type(AutoModelForCausalLM.from_config(tiny.config())) is ImplicitAttentionForCausalLM


class Labelled(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, i):
        return {"input_ids": tiny.tokens(1, 12, seed=i)[0].clamp_min(1), "labels": i % 2}


def test_a_classifier_learns_the_same_from_parts_of_a_batch(tmp_path):
    """Trainer divides by the number of parts, unless a model says that its loss is divided already."""

    def first_step(parts):
        settings = TrainingArguments(
            tmp_path / str(parts), max_steps=1, per_device_train_batch_size=8 // parts, seed=3, logging_steps=1,
            gradient_accumulation_steps=parts, report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no",
            learning_rate=0.0,
        )  # fmt: skip
        model = tiny.make(ImplicitAttentionForSequenceClassification, num_labels=2, **MIXED).train()
        trainer = Trainer(model, settings, train_dataset=Labelled())
        trainer.train()
        return [trainer.state.log_history[0][name] for name in ("loss", "grad_norm")]

    assert first_step(4) == pytest.approx(first_step(1), rel=1e-4)
    assert not ImplicitAttentionForQuestionAnswering.accepts_loss_kwargs
