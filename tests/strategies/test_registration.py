"""The strategies are found by name, whoever is imported first, and cost nothing until then."""

import subprocess
import sys

import pytest

ORDERS = {
    "lightning first": "import lightning.pytorch, lightning_peft",
    "the package first": "import lightning_peft, lightning.pytorch",
    "in its midst": "import lightning_peft; from lightning.pytorch.strategies import DDPStrategy",
    "by a name of it": "from lightning_peft import PEFTModule",
    "twice": "import lightning_peft; lightning_peft._strategies.register(); import lightning.pytorch; lightning_peft._strategies.register()",
}


def output(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100
    ).stdout.strip()


@pytest.mark.parametrize("order", ORDERS)
def test_names_are_registered_in_any_order_of_imports(order):
    asked = (
        "from lightning.pytorch.strategies import StrategyRegistry as R; from lightning.pytorch import Trainer; import sys; "
        "print(sorted(n for n in R if n.startswith('peft_')), 'lightning_peft.strategies.fsdp' in sys.modules, "
        "sum(type(f).__name__ == '_Waiting' for f in sys.meta_path)); "
        "t = Trainer(accelerator='cpu', devices=2, strategy='peft_fsdp', logger=False, enable_checkpointing=False); "
        "print(type(t.strategy).__name__)"
    )
    printed = output(f"{ORDERS[order]}; {asked}").splitlines()
    assert printed[0] == "['peft_ddp', 'peft_fsdp'] False 0"
    assert printed[-1] == "PEFTFSDPStrategy"


def test_the_package_alone_imports_neither_torch_nor_lightning():
    code = "import sys, lightning_peft; import lightning_peft.strategies; print(sorted({'torch', 'lightning'} & set(sys.modules)))"
    assert output(code) == "[]"


def test_lightning_that_is_not_there_is_no_error():
    code = (
        "import sys; sys.modules['lightning'] = None; import lightning_peft\n"
        "try:\n    import lightning.pytorch\nexcept ModuleNotFoundError as e:\n    print('missing')"
    )
    assert output(code) == "missing"


@pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX` has been removed")
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--trainer.strategy=peft_ddp"], "PEFTDDPStrategy"),
        (["--trainer.strategy=peft_fsdp"], "PEFTFSDPStrategy"),
        (["--trainer.strategy=lightning_peft.PEFTFSDPStrategy", "--trainer.strategy.replicate=2"], "PEFTFSDPStrategy"),
        (
            ["--trainer.strategy=lightning_peft.strategies.PEFTFSDPStrategy", "--trainer.strategy.gather_dtype=bf16"],
            "PEFTFSDPStrategy",
        ),
        (
            ["--trainer.strategy=lightning_peft.PEFTDDPStrategy", "--trainer.strategy.start_method=fork"],
            "PEFTDDPStrategy",
        ),
    ],
)
def test_the_command_line_takes_names_and_classes(arguments, expected, tmp_path, monkeypatch):
    from lightning_peft import PEFTCLI

    monkeypatch.chdir(tmp_path)
    base = [
        "--model.base=CausalLMLoader",
        "--model.base.path=nowhere",
        "--model.method=LoRA",
        "--trainer.accelerator=cpu",
        "--trainer.devices=2",
    ]
    data = ["--data=TextDataModule", "--data.tokenizer=nowhere", "--data.train=nowhere.txt"]
    cli = PEFTCLI(args=[*base, *data, *arguments], run=False)
    assert type(cli.trainer.strategy).__name__ == expected
