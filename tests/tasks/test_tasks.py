"""Tasks in a PEFTModule: what is logged equals what other libraries compute from the same predictions."""

import pytest
import sklearn.metrics as reference
import torch
from scipy import stats
from torch.utils.data import DataLoader
from transformers import (
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForMultipleChoice,
    RobertaForTokenClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from lightning_peft import (
    CausalLMTask,
    ClassificationTask,
    FullFineTuning,
    LoRA,
    MultipleChoiceTask,
    PEFTModule,
    Seq2SeqTask,
    SequenceClassificationLoader,
    TokenClassificationTask,
    load_adapter,
    save_adapter,
)
from lightning_peft.errors import ConfigError
from lightning_peft.tasks.text_scores import TextScores

SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
ROBERTA = RobertaConfig(**SIZES, max_position_embeddings=40, pad_token_id=1)
ROWS, LENGTH = 23, 7


@pytest.fixture(scope="module")
def roberta_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "roberta"
    torch.manual_seed(0)
    RobertaForMaskedLM(ROBERTA).save_pretrained(folder)
    return str(folder)


def rows(labels, ids=None, batch_size=5):
    ids = torch.randint(3, 50, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1)) if ids is None else ids
    return DataLoader([{"input_ids": one, "labels": label} for one, label in zip(ids, labels, strict=True)], batch_size)


def spread(model, scale=0.5):
    """Weights large enough for the predictions to differ."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model.eval()


def measured(module, loader, make_trainer, tmp_path):
    """What validation logs, and the logits and labels of all batches."""
    trainer = make_trainer(tmp_path)
    (logged,) = trainer.validate(module, loader, verbose=False)
    module.eval()
    with torch.no_grad():
        logits = [module.predict_outputs(batch).logits for batch in loader]
    return logged, torch.cat(logits), torch.cat([batch["labels"] for batch in loader])


@pytest.mark.parametrize(("classes", "average"), [(2, "macro"), (4, "macro"), (4, "weighted")])
def test_classification_is_measured_as_sklearn_does(classes, average, roberta_dir, make_trainer, tmp_path):
    labels = torch.randint(classes, (ROWS,), generator=torch.Generator().manual_seed(2))
    task = ClassificationTask(num_labels=classes, metrics=["accuracy", "f1", "matthews"], average=average)
    base = spread(SequenceClassificationLoader(path=roberta_dir, num_labels=classes).load(), scale=1.5)
    module = PEFTModule(base, LoRA(rank=2), task=task)
    logged, logits, wanted = measured(module, rows(labels), make_trainer, tmp_path)
    predicted = logits.argmax(-1)
    assert len(predicted.unique()) > 1
    assert logged["val_accuracy"] == pytest.approx(reference.accuracy_score(wanted, predicted))
    f1 = reference.f1_score(wanted, predicted, average="binary" if classes == 2 else average)
    assert logged["val_f1"] == pytest.approx(f1)
    assert logged["val_matthews"] == pytest.approx(reference.matthews_corrcoef(wanted, predicted))
    assert set(logged) == {"val_loss", "val_accuracy", "val_f1", "val_matthews"}


@pytest.mark.filterwarnings("ignore:Metric `SpearmanCorrcoef` will save:UserWarning")
def test_regression_is_measured_as_scipy_does(roberta_dir, make_trainer, tmp_path):
    numbers = torch.randn(ROWS, generator=torch.Generator().manual_seed(2))
    task = ClassificationTask(num_labels=1, metrics=["pearson", "spearman", "mse", "mae"])
    base = spread(SequenceClassificationLoader(path=roberta_dir, num_labels=1).load())
    logged, logits, wanted = measured(PEFTModule(base, LoRA(rank=2), task=task), rows(numbers), make_trainer, tmp_path)
    predicted = logits.flatten()
    assert logged["val_pearson"] == pytest.approx(stats.pearsonr(wanted, predicted)[0], abs=1e-5)
    assert logged["val_spearman"] == pytest.approx(stats.spearmanr(wanted, predicted)[0], abs=1e-5)
    assert logged["val_mse"] == pytest.approx(reference.mean_squared_error(wanted, predicted), rel=1e-5)
    assert logged["val_mae"] == pytest.approx(reference.mean_absolute_error(wanted, predicted), rel=1e-5)


def test_tokens_without_a_label_are_not_measured(make_trainer, tmp_path):
    labels = torch.randint(3, (ROWS, LENGTH), generator=torch.Generator().manual_seed(2))
    labels[:, 0] = labels[3, 2:] = -100
    model = spread(RobertaForTokenClassification(RobertaConfig(**ROBERTA.to_dict(), num_labels=3)))
    task = TokenClassificationTask(num_labels=3, metrics=["accuracy", "f1", "matthews"])
    logged, logits, wanted = measured(PEFTModule(model, LoRA(rank=2), task=task), rows(labels), make_trainer, tmp_path)
    counted = wanted != -100
    predicted, wanted = logits.argmax(-1)[counted], wanted[counted]
    assert logged["val_accuracy"] == pytest.approx(reference.accuracy_score(wanted, predicted))
    assert logged["val_f1"] == pytest.approx(reference.f1_score(wanted, predicted, average="macro"))
    assert logged["val_matthews"] == pytest.approx(reference.matthews_corrcoef(wanted, predicted))
    assert "val_perplexity" not in logged


def test_multiple_choice_counts_right_choices_over_all_rows(make_trainer, tmp_path):
    ids = torch.randint(3, 50, (ROWS, 4, LENGTH), generator=torch.Generator().manual_seed(1))
    labels = torch.randint(4, (ROWS,), generator=torch.Generator().manual_seed(2))
    module = PEFTModule(spread(RobertaForMultipleChoice(ROBERTA)), LoRA(rank=2), task=MultipleChoiceTask())
    logged, logits, wanted = measured(module, rows(labels, ids), make_trainer, tmp_path)
    assert logits.shape == (ROWS, 4)
    assert logged["val_accuracy"] == pytest.approx((logits.argmax(-1) == wanted).float().mean().item())


# -- heads that are new ------------------------------------------------------------------------------------------------


def test_a_new_head_is_trained_and_comes_back_with_the_adapter(roberta_dir, make_trainer, tmp_path):
    loader = SequenceClassificationLoader(path=roberta_dir, num_labels=3)
    module = PEFTModule(loader, LoRA(rank=2), task=ClassificationTask(num_labels=3))
    labels = torch.randint(3, (ROWS,), generator=torch.Generator().manual_seed(2))
    make_trainer(tmp_path, max_steps=2).fit(module, rows(labels))
    assert module.adaptations[0].modules_to_save == ["classifier"]
    save_adapter(module.model, tmp_path / "adapter")
    torch.manual_seed(99)  # another random head
    again = loader.load()
    load_adapter(again, tmp_path / "adapter")
    ids = next(iter(rows(labels)))["input_ids"]
    torch.testing.assert_close(again.eval()(ids).logits, module.model.eval()(ids).logits, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("method", "targets", "given", "expected"),
    [
        (LoRA(rank=2), None, ["classifier"], ["classifier"]),
        (LoRA(rank=2), ["query", "re:classifier.dense"], None, ["classifier"]),
        (FullFineTuning(), None, None, ["classifier"]),
    ],
    ids=["named", "adapted by name", "full"],
)
def test_a_new_head_is_trained_once(method, targets, given, expected, roberta_dir, make_trainer, tmp_path):
    loader = SequenceClassificationLoader(path=roberta_dir, num_labels=3)
    module = PEFTModule(loader, method, targets, modules_to_save=given)
    module.configure_model()
    assert module.adaptations[0].modules_to_save == expected
    trained = {name for name, parameter in module.model.named_parameters() if parameter.requires_grad}
    assert any("classifier" in name for name in trained)


# -- generated text ----------------------------------------------------------------------------------------------------


def answers(llama, prompts, **options):
    """What transformers generates for each prompt alone."""
    return [llama.generate(ids[None], do_sample=False, pad_token_id=2, **options)[0, len(ids) :] for ids in prompts]


def prompted(prompts, wanted):
    """Rows of prompts and answers, filled up behind with what is not looked at."""
    longest = max(len(p) + len(a) for p, a in zip(prompts, wanted, strict=True))
    made = []
    for prompt, answer in zip(prompts, wanted, strict=True):
        fill = torch.zeros(longest - len(prompt) - len(answer), dtype=torch.long)
        ids = torch.cat([prompt, answer, fill])
        labels = torch.cat([torch.full_like(prompt, -100), answer, fill - 100])
        made.append(
            {
                "input_ids": ids,
                "labels": labels,
                "attention_mask": torch.cat([torch.ones(len(prompt) + len(answer)), fill]).long(),
            }
        )
    return DataLoader(made, 3)


def test_a_causal_model_is_scored_on_what_it_generates_alone(llama, llama_dir, make_trainer, tmp_path):
    """The references of two rows are what the model says to their prompts alone, of the third something else."""
    generator = torch.Generator().manual_seed(4)
    prompts = [torch.randint(3, 40, (length,), generator=generator) for length in (5, 2, 7)]
    spread(llama)
    wanted = answers(llama, prompts, max_new_tokens=6)
    wanted[2] = torch.tensor([5, 6, 7])
    task = CausalLMTask(metrics=["exact_match", "chrf"], tokenizer=llama_dir, generation={"max_new_tokens": 6})
    module = PEFTModule(llama, LoRA(rank=2), task=task)
    (logged,) = make_trainer(tmp_path).validate(module, prompted(prompts, wanted), verbose=False)
    assert logged["val_exact_match"] == pytest.approx(2 / 3)
    assert 0 < logged["val_chrf"] < 100
    assert {"val_loss", "val_perplexity", "val_token_accuracy"} < set(logged)
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert trained
    assert module.training  # as before


def test_references_of_a_batch_are_taken_and_not_given_to_the_model(llama, llama_dir, make_trainer, tmp_path):
    ids = torch.tensor([[4, 5, 6, 7]])
    batch = {"input_ids": ids, "labels": torch.tensor([[-100, -100, 6, 7]]), "references": [["x", "y"]]}
    seen = []
    monkey = TextScores.update
    task = CausalLMTask(metrics=["exact_match"], tokenizer=llama_dir, generation={"max_new_tokens": 2})
    module = PEFTModule(llama, LoRA(rank=2), task=task)
    module.configure_model()
    metrics = task.make_metrics("val")
    metrics["text"].update = lambda *args: (seen.append(args), monkey(metrics["text"], *args))
    module.eval()
    task.update(metrics, module.model, module.predict_outputs(batch), batch)
    assert seen[0][2] == [["x", "y"]]
    assert task.inputs(batch).keys() == {"input_ids", "labels"}


def test_a_text_to_text_model_is_scored_on_what_it_generates(llama_dir, make_trainer, tmp_path):
    config = T5Config(
        vocab_size=61,
        d_model=16,
        d_kv=8,
        d_ff=16,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = spread(T5ForConditionalGeneration(config))
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(3, 61, (4, 6), generator=generator)
    mask = torch.ones_like(ids)
    ids[1, 4:], mask[1, 4:] = 0, 0
    with torch.no_grad():
        made = [
            model.generate(row[keep.bool()][None], do_sample=False, max_new_tokens=5)[0, 1:]
            for row, keep in zip(ids, mask, strict=True)
        ]
    labels = torch.full((4, 5), -100)
    for row, answer in enumerate(made):
        labels[row, : len(answer)] = answer
    labels[3] = 7
    task = Seq2SeqTask(
        metrics=["exact_match"], tokenizer=llama_dir, generation={"max_new_tokens": 5}, generate_in=["test"]
    )
    module = PEFTModule(model, LoRA(rank=2), task=task)
    loader = DataLoader(
        [{"input_ids": i, "attention_mask": m, "labels": w} for i, m, w in zip(ids, mask, labels, strict=True)], 2
    )
    trainer = make_trainer(tmp_path)
    (logged,) = trainer.test(module, loader, verbose=False)
    assert logged["test_exact_match"] == pytest.approx(3 / 4)
    (logged,) = trainer.validate(module, loader, verbose=False)
    assert "val_exact_match" not in logged
    assert "val_perplexity" in logged


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ClassificationTask(num_labels=2, metrics=["accurracy"]), "did you mean 'accuracy'"),
        (lambda: ClassificationTask(num_labels=2, metrics="f1"), r"write \['f1'\]"),
        (lambda: ClassificationTask(num_labels=2, metrics=["pearson"]), "must be among accuracy, f1, matthews"),
        (lambda: ClassificationTask(num_labels=1, metrics=["f1"]), "must be among pearson"),
        (lambda: ClassificationTask(num_labels=0), "1 or more, got 0"),
        (lambda: ClassificationTask(average="median"), "got 'median'"),
        (lambda: TokenClassificationTask(num_labels=1), "2 or more, got 1"),
        (lambda: CausalLMTask(metrics=["bleu"]), "needs a tokenizer"),
        (lambda: CausalLMTask(metrics=["blue"], tokenizer="x"), "did you mean 'bleu'"),
        (lambda: CausalLMTask(generation={"num_beam": 2}), "did you mean 'num_beams'"),
        (lambda: CausalLMTask(generate_in=["train"]), "must be among val, test"),
        (lambda: PEFTModule(torch.nn.Linear(2, 2), LoRA(rank=1), task="causal"), "must be a Task"),
    ],
)
def test_wrong_settings_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_batch_without_prompts_is_refused(llama, llama_dir, make_trainer, tmp_path):
    task = CausalLMTask(metrics=["exact_match"], tokenizer=llama_dir)
    ids = torch.randint(3, 61, (2, 6))
    for labels, why in ((ids, "no prompt"), (torch.full_like(ids, -100), "no answer")):
        with pytest.raises(ConfigError, match=why):
            task.prompts({"input_ids": ids, "labels": labels})


def test_logits_of_another_task_are_refused(llama, make_trainer, tmp_path):
    module = PEFTModule(llama, LoRA(rank=2), task=ClassificationTask(num_labels=2))
    ids = torch.randint(3, 61, (2, 6))
    with pytest.raises(ConfigError, match="give the model and the data of that task"):
        make_trainer(tmp_path).validate(
            module, DataLoader([{"input_ids": one, "labels": one} for one in ids], 2), verbose=False
        )
    with pytest.raises(ConfigError, match="num_labels=3, but the model gives 2"):
        ClassificationTask(num_labels=3).update({}, llama, torch.zeros(1, 2), {"labels": torch.zeros(1)})


# -- odd runs ----------------------------------------------------------------------------------------------------------


def test_a_fit_may_follow_a_validation(llama, make_trainer, tmp_path):
    module = PEFTModule(llama, LoRA(rank=2), task=CausalLMTask())
    ids = torch.randint(3, 61, (4, 8), generator=torch.Generator().manual_seed(1))
    data = DataLoader(ids, 2)
    trainer = make_trainer(tmp_path, max_epochs=1)
    (before,) = trainer.validate(module, data, verbose=False)
    trainer.fit(module, data, data)
    assert trainer.callback_metrics["val_loss"] != before["val_loss"]


def test_a_batch_in_which_no_token_is_labelled_counts_nothing(make_trainer, tmp_path):
    from transformers import RobertaForTokenClassification

    torch.manual_seed(0)
    model = RobertaForTokenClassification(RobertaConfig(**{**ROBERTA.to_dict(), "num_labels": 3}))
    module = PEFTModule(model, LoRA(rank=2), task=TokenClassificationTask(num_labels=3))
    ids = torch.randint(3, 50, (3, LENGTH), generator=torch.Generator().manual_seed(1))
    labels = torch.randint(3, (3, LENGTH), generator=torch.Generator().manual_seed(2))
    labels[1] = -100
    kept = [
        measured(
            module,
            DataLoader([{"input_ids": a, "labels": b} for a, b in zip(ids[chosen], labels[chosen], strict=True)], 1),
            make_trainer,
            tmp_path,
        )[0]
        for chosen in ([0, 1, 2], [0, 2])
    ]
    assert kept[0] == pytest.approx(kept[1])
    assert kept[0]["val_loss"] > 0


def test_what_is_generated_has_room_whatever_else_is_asked_for(llama, llama_dir, make_trainer, tmp_path):
    prompts = [torch.arange(3, 28)]  # longer than what transformers takes for the length
    wanted = [torch.arange(28, 31)]
    task = CausalLMTask(metrics=["exact_match"], tokenizer=llama_dir, generation={"num_beams": 2})
    lengths = []
    generate = llama.generate
    llama.generate = lambda **given: lengths.append(given["max_new_tokens"]) or generate(**given)
    make_trainer(tmp_path).validate(
        PEFTModule(llama, LoRA(rank=2), task=task), prompted(prompts, wanted), verbose=False
    )
    assert lengths == [64]
