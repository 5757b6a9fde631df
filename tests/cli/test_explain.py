import pytest

from lightning_peft.cli.explain import explain

OPTIONS = ["--model.method", "--model.base", "--model.targets", "--trainer.max_steps", "--trainer.min_steps"]


@pytest.mark.parametrize(
    ("message", "plain"),
    [
        ("unrecognized arguments: --zzz 3", "unknown option '--zzz'"),
        ("unrecognized arguments: x", "unexpected argument 'x'"),
        (
            "unrecognized arguments: --trainer.max_stps=3",
            "unknown option '--trainer.max_stps'; did you mean '--trainer.max_steps' or '--trainer.min_steps'?",
        ),
        (
            "Subcommand 'fit' does not accept option 'model.metod'",
            "unknown key 'model.metod'; did you mean 'model.method'?",
        ),
        ("Group 'model' does not accept option 'metod'", "unknown key 'model.metod'; did you mean 'model.method'?"),
        ("the following arguments are required: fit.model.base, fit.data", "--model.base, --data must be given"),
        (
            "Parser key \"data\":\n  Problem with given class_path 'a.B':\n    the following arguments are required: train",
            "--data.train must be given",
        ),
        (
            'Parser key "x": Not of type PositiveInt: 0 does not conform to restriction v>0',
            "--x: expected number >0, got '0'",
        ),
        ("something nobody thought of", "something nobody thought of"),
    ],
)
def test_a_complaint_becomes_a_sentence(message, plain):
    assert explain(message, OPTIONS) == plain


def test_the_letter_case_of_a_name_does_not_hide_it():
    message = 'Parser key "model.method":\n  Expected a dot import path string: LORA'
    assert explain(message).startswith("--model.method: unknown class 'LORA'; did you mean 'LoRA'? Known: ")
