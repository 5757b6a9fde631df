import re
import subprocess
import sys

import pytest

from lightning_peft import __version__
from lightning_peft.cli import main
from lightning_peft.registry import get_registry

BASE = ["--model.base", "CausalLMLoader", "--model.base.path", "somewhere"]
METHOD = ["--model.method", "LoRA"]
DATA = ["--data", "TextDataModule", "--data.tokenizer", "somewhere", "--data.train", "a.txt"]


@pytest.fixture
def refusal(capsys):
    """Run the program, see it refuse with exit code 2 and no more than two lines, and return what it says."""

    def run(*args):
        assert main([str(arg) for arg in args]) == 2
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        lines = [line for line in captured.err.splitlines() if not line.startswith(("Seed set", "See "))]
        assert lines[0].startswith("error: "), captured.err
        return "\n".join(lines).removeprefix("error: ")

    return run


def test_the_help_shows_every_verb(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for verb in (
        "fit",
        "validate",
        "test",
        "predict",
        "merge",
        "generate",
        "combine",
        "diff",
        "inspect",
        "prune",
        "to-lora",
        "fingerprint",
        "methods",
        "plugins",
    ):
        assert f"    {verb} " in text


def test_the_version_is_ours(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith(f"lightning-peft {__version__} (lightning ")


def test_the_help_of_a_verb_describes_every_argument(capsys):
    assert main(["merge", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--adapter ADAPTER adapter folder, ours or HF PEFT's. (required, type: str)" in text
    assert "--overwrite Replace the model that stands in the output folder." in text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["fitt"], r"unknown command 'fitt'; did you mean 'fit'\? Commands: fit, .*, plugins$"),
        ([], "a command must be given"),
        (["--vers"], r"unknown option '--vers'; did you mean '--version'\?$"),
        (["merge", "--adaptr", "x"], r"unknown option '--adaptr'; did you mean '--adapter'\?$"),
        (["merge", "--output", "x"], "--adapter must be given$"),
        (
            ["merge", "--adapter", "a", "--output", "o", "--check_base", "maybe"],
            "--check_base: expected bool, got 'maybe'$",
        ),
        (
            ["merge", "--adapter", "a", "--output", "o", "--dtype", "float31"],
            "got 'float31'; did you mean 'float32' or",
        ),
        (["generate", "--prompt", "x", "--max_new_tokens", "0"], "--max_new_tokens: expected number >0, got '0'$"),
        (["generate", "--prompt", "x"], "generate needs a model: give --adapter FOLDER, --base FOLDER_OR_ID, or both$"),
    ],
)
def test_a_wrong_command_line_is_refused(refusal, args, message):
    assert re.search(message, refusal(*args))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            [*BASE, *DATA, "--model.method", "Lora"],
            r"--model.method: unknown class 'Lora'; did you mean 'LoRA'\? Known: .*LoRA",
        ),
        ([*BASE, *DATA, "--model.method", "lorra"], "--model.method: unknown class 'lorra'; did you mean 'LoRA'"),
        ([*BASE, *DATA, "--model.method.help", "Lora"], "--model.method: unknown class 'Lora'; did you mean 'LoRA'"),
        (
            [*BASE, *DATA, "--model.method", "[lora, norm_tunin]"],
            "--model.method: unknown class 'norm_tunin' in the list; did you mean 'norm_tuning' or 'NormTuning'",
        ),
        (
            [*BASE, *DATA, "--model.method", "[lora, NormTunin]"],
            "--model.method: unknown class 'NormTunin' in the list; did you mean 'NormTuning'",
        ),
        ([*BASE, *DATA, "--model.method.rank", "3"], "--model.method: name a class, .* Known: .*LoRA"),
        (
            [*BASE, *METHOD, *DATA, "--model.method.rnk", "3"],
            r"--model.method: LoRA has no option 'rnk'; did you mean 'rank'\? It has: rank, alpha, ",
        ),
        ([*BASE, *METHOD, *DATA, "--model.method.rank", "abc"], "--model.method.rank: expected int, got 'abc'$"),
        ([*BASE, *METHOD, *DATA, "--model.method.rank", "0"], "^LoRA rank must be a positive integer, got 0$"),
        (
            [*BASE, *METHOD, *DATA, "--model.method.bias", "al"],
            r"--model.method.bias: expected one of 'none', 'all', 'lora_only', got 'al'; did you mean 'all'\?$",
        ),
        (
            [*METHOD, *DATA, "--model.base", "CausalLMLoder"],
            "--model.base: unknown class 'CausalLMLoder'; did you mean 'CausalLMLoader'",
        ),
        (
            [*BASE, *METHOD, *DATA, "--model.base.pth", "x"],
            "--model.base: CausalLMLoader has no option 'pth'; did you mean 'path'",
        ),
        (
            [*BASE, *METHOD, "--data", "TextDatModule"],
            "--data: unknown class 'TextDatModule'; did you mean 'TextDataModule'",
        ),
        ([*BASE, *METHOD, "--data", "TextDataModule"], "--data.tokenizer, --data.train must be given$"),
        ([*BASE, *METHOD, "--data", "no_such.Data"], "--data: No module named 'no_such'$"),
        ([*BASE, *METHOD], "--data must be given$"),
        ([*METHOD, *DATA], "--model.base must be given$"),
        (
            [*BASE, *METHOD, *DATA, "--model.targts", "x"],
            r"unknown option '--model.targts'; did you mean '--model.targets'\?$",
        ),
        (
            [*BASE, *METHOD, *DATA, "--trainer.max_step", "3"],
            "unknown option '--trainer.max_step'; did you mean '--trainer.max_steps'",
        ),
        ([*BASE, *METHOD, *DATA, "--trainer.max_steps", "abc"], "--trainer.max_steps: expected int, got 'abc'$"),
        (
            [*BASE, *METHOD, *DATA, "--trainer.callbacks+=AdapterChekpoint"],
            "--trainer.callbacks: unknown class 'AdapterChekpoint'; did you mean 'AdapterCheckpoint'",
        ),
        (
            [*BASE, *METHOD, *DATA, "--trainer.callbacks+=AdapterCheckpoint", "--trainer.callbacks.montor=x"],
            "--trainer.callbacks: AdapterCheckpoint has no option 'montor'; did you mean 'monitor'",
        ),
        (
            [*BASE, *METHOD, *DATA, "--model.optimizer", "AdamWW"],
            "--model.optimizer: unknown class 'AdamWW'; did you mean 'AdamW'",
        ),
        ([*BASE, *METHOD, *DATA, "--model.optimizer.lr", "x"], "--model.optimizer.lr: expected float, got 'x'$"),
        ([*BASE, *METHOD, *DATA, "--model.adapter", "x"], "^give either a method or an adapter folder to start from"),
        (["--config", "nowhere.yaml"], "--config: File does not exist: '.*nowhere.yaml'$"),
    ],
)
def test_a_wrong_argument_of_fit_is_refused(refusal, args, message):
    assert re.search(message, refusal("fit", *args))


COMPLETE = "  base: {class_path: CausalLMLoader, init_args: {path: x}}\ndata: {class_path: TextDataModule, init_args: {tokenizer: x, train: a}}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model:\n  metod: LoRA\n", r"unknown key 'model.metod'; did you mean 'model.method'\?$"),
        ("trainer:\n  max_step: 3\n", "unknown key 'trainer.max_step'; did you mean 'trainer.max_steps'"),
        ("model:\n  method: Lora\n" + COMPLETE, "--model.method: unknown class 'Lora'; did you mean 'LoRA'"),
        (
            "model:\n  method: {class_path: LoRA, init_args: {rnk: 3}}\n" + COMPLETE,
            "--model.method: LoRA has no option 'rnk'; did you mean 'rank'",
        ),
        (
            "model:\n  method: {class_path: LoRA, rank: 3}\n" + COMPLETE,
            "--model.method: name a class, .* Known: .*LoRA",
        ),
        (
            "model:\n  method: LoRA\n  targets: {include: [query], layer: 3}\n" + COMPLETE,
            "Targets has no option 'layer'; did you mean 'layers'",
        ),
        (
            "model:\n  method: LoRA\n  method: LoRA\n" + COMPLETE,
            r"the key 'method' stands twice\n  in \".*run.yaml\", line 3",
        ),
        (
            "model:\n  method: LoRA\n  targets: ${oc.env:NOT_SET_X}\n" + COMPLETE,
            "run.yaml: Environment variable 'NOT_SET_X' not found$",
        ),
        ("trainer:\nmodel:\n  method: LoRA\n" + COMPLETE, "'trainer' must hold options, got None$"),
        ("model: [\n", "while parsing a flow node"),
    ],
)
def test_a_wrong_configuration_file_is_refused(refusal, tmp_path, text, message):
    (tmp_path / "run.yaml").write_text(text)
    assert re.search(message, refusal("fit", "--config", tmp_path / "run.yaml"))


def test_a_typo_ends_a_process_with_code_2_and_no_traceback(tmp_path):
    command = [sys.executable, "-m", "lightning_peft.cli", "merge", "--adaptr", "x"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr == "error: unknown option '--adaptr'; did you mean '--adapter'?\nSee lightning-peft merge --help\n"
    )


def test_help_imports_nothing_heavy(tmp_path):
    code = (
        "import sys; from lightning_peft.cli import main; code = main(['--help']);"
        "sys.exit(code or sum(name in sys.modules for name in ('torch', 'lightning', 'transformers', 'rich')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr


def test_methods_lists_what_each_can_do(capsys, acme):
    assert main(["methods"]) == 0
    rows = {
        cells[1]: cells[2:-1]
        for line in capsys.readouterr().out.splitlines()
        if len(cells := re.split(r"\s*│\s*", line)) > 2
    }
    able = ["yes"] * 6 + ["no"]  # values from data
    assert rows["lora"] == ["LoRA", *able, "LORA", "all_linear", f"lightning-peft {__version__}"]
    assert rows["acme_lora"] == ["AcmeLoRA", *able, "no", "all_linear", "acme_peft"]


def test_plugins_lists_what_each_provides_and_why_one_is_broken(capsys, tmp_path, monkeypatch):
    (tmp_path / "acme_broken.py").write_text("raise ImportError('no module [acme_kernels] [/x]')")
    info = tmp_path / "acme_broken-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-broken\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text("[lightning_peft]\nacme = acme_broken\n")
    monkeypatch.syspath_prepend(tmp_path)
    get_registry.cache_clear()
    try:
        assert main(["plugins"]) == 0
    finally:
        get_registry.cache_clear()
    text = capsys.readouterr().out
    assert re.search(r"lightning_peft.plugins.lora +│ method: lora +│ ok", text)
    assert re.search(
        r"acme-broken 1.2 \(acme = acme_broken\) +│ - +│ broken: ImportError: no module \[acme_kernels\] \[/x\] │", text
    )


def test_what_other_libraries_refuse_is_an_error_without_a_traceback(tmp_path, capsys):
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe{")
    assert main(["fit", "--config", str(tmp_path / "run.yaml")]) == 2
    captured = capsys.readouterr().err
    assert "error: " in captured
    assert "Traceback" not in captured


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            "[{method: lora, target: query}]",
            "--model.method: Adaptation has no option 'target'; did you mean 'targets'?",
        ),
        (
            "[{method: {class_path: lora, init_args: {rnk: 2}}}]",
            "--model.method.method: LoRA has no option 'rnk'; did you mean 'rank'?",
        ),
    ],
)
def test_a_wrong_option_inside_a_list_of_methods_is_refused(refusal, value, message):
    base = ["--model.base", "CausalLMLoader", "--model.base.path", "somewhere"]
    assert message in refusal("fit", *base, "--data", "TextDataModule", "--model.method", value)
