"""A method from another package: built, installed, found by its entry point, trained from YAML, and equal to HF PEFT's.

The package is ``examples/plugins/lightning-peft-ia3``. Nothing in ``lightning_peft`` knows of it.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from unittest import mock

import pytest
import safetensors.torch
import torch

import lightning_peft
from lightning_peft import LoRA, get_registry, inject, load_adapter, merge_adapters, save_adapter
from lightning_peft.errors import AdapterConfigError, AdapterMismatchError, ConfigError, MergeError, TargetError
from lightning_peft.testing import tiny_gpt2, tiny_llama, token_batch

# HF PEFT asks transformers in words that are going out of use.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.* is deprecated:FutureWarning")

EXAMPLE = Path(__file__).parents[1] / "examples" / "plugins" / "lightning-peft-ia3"


@pytest.fixture(scope="module")
def ia3():
    """The module of the example, in the registry of this process for as long as these tests run."""
    spec = importlib.util.spec_from_file_location("lightning_peft_ia3", EXAMPLE / "lightning_peft_ia3.py")
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, {"lightning_peft_ia3": module}):
        spec.loader.exec_module(module)
        with mock.patch.dict(get_registry().methods, {"ia3": module.IA3}):
            yield module


# -- the same as HF PEFT -----------------------------------------------------------------------------------------------

LLAMA = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
GPT2 = {"target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"], "fan_in_fan_out": True}
MODELS = pytest.mark.parametrize(
    ("make", "settings"),
    [(lambda: tiny_llama(attention_bias=True, mlp_bias=True), LLAMA), (tiny_gpt2, GPT2)],
    ids=["llama", "gpt2"],
)


def logits(model):
    with torch.no_grad():
        return model.eval()(**token_batch()).logits


def assert_equal_logits(found, wanted):
    assert (found - wanted).abs().max() <= 1e-6 * wanted.abs().max()


@torch.no_grad()
def randomise(model):
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "ia3_l" in name:
            parameter.copy_(1 + torch.randn(parameter.shape, generator=generator) / 2)


def hf_model(make, settings):
    from peft import IA3Config, get_peft_model

    model = get_peft_model(make(), IA3Config(task_type="CAUSAL_LM", **settings))
    randomise(model)
    return model


@MODELS
def test_a_folder_of_hf_peft_gives_the_same_logits(ia3, tmp_path, make, settings):
    theirs, ours = hf_model(make, settings), make()
    theirs.save_pretrained(tmp_path)
    assert isinstance(load_adapter(ours, tmp_path).method, ia3.IA3)
    assert_equal_logits(logits(ours), logits(theirs))
    merge_adapters(ours)
    assert_equal_logits(logits(ours), logits(theirs.merge_and_unload()))


@MODELS
@pytest.mark.parametrize("targets", [None, ["key", "value"], ["down"]], ids=str)
def test_hf_peft_reads_our_folder(ia3, tmp_path, make, settings, targets):
    from peft import PeftModel

    ours = make()
    inject(ours, ia3.IA3(), targets)
    randomise(ours)
    save_adapter(ours, tmp_path)
    theirs = PeftModel.from_pretrained(make(), tmp_path)
    assert_equal_logits(logits(theirs), logits(ours))
    assert (logits(ours) - logits(make())).abs().max() > 0.01


def test_slices_leave_the_query_of_gpt2_alone(ia3, tmp_path):
    model = tiny_gpt2()
    inject(model, ia3.IA3())
    randomise(model)
    save_adapter(model, tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    factors = tensors["base_model.model.transformer.h.0.attn.c_attn.ia3_l"]
    assert factors.shape == (192, 1)
    assert (factors[:64] == 1).all()
    assert (factors[64:] != 1).all()


# -- what it refuses ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"feedforward_modules": []}, AdapterMismatchError, r"has shape \(1, 128\), this model needs \(64, 1\)"),
        ({"feedforward_modules": ".*down_proj"}, AdapterConfigError, r"regular expression '\.\*down_proj'"),
        ({"feedforward_modules": ["dwn_proj"]}, AdapterMismatchError, "feedforward='dwn_proj' matches no module"),
        ({"feedforward_modules": [7]}, AdapterConfigError, r"IA3 feedforward=\(7,\)"),
        ({"modules_to_save": ["lm_head"]}, AdapterMismatchError, r"Missing: \['lm_head.weight'\]"),
    ],
)
def test_a_folder_that_means_something_else_is_refused(ia3, tmp_path, change, error, message):
    hf_model(tiny_llama, LLAMA).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(error, match=message):
        load_adapter(tiny_llama(), tmp_path)


def test_feedforward_that_matches_nothing_is_refused(ia3):
    with pytest.raises(TargetError, match="feedforward='dwn' matches no module of LlamaForCausalLM"):
        inject(tiny_llama(), ia3.IA3(feedforward=["dwn"]))


def test_feedforward_must_be_targets(ia3):
    with pytest.raises(ConfigError, match=r"IA3 feedforward=.*non-empty string"):
        ia3.IA3(feedforward=[""])


def test_factors_outside_the_slices_are_refused(ia3, tmp_path):
    model = tiny_gpt2()
    inject(model, ia3.IA3())
    adapter = model.transformer.h[0].attn.c_attn.adapters["default"]
    with pytest.raises(AdapterConfigError, match="outside the slices"):
        adapter.import_state({"ia3_l": torch.full((192, 1), 2.0)})


def test_a_packed_base_is_not_merged_into(ia3):
    model = torch.nn.Sequential(get_registry().get("quantizer", "nf4")().quantize(torch.nn.Linear(64, 64)))
    inject(model, ia3.IA3(feedforward=[]), "0")
    with pytest.raises(MergeError, match="quantised base cannot be merged"):
        merge_adapters(model)


# -- as a package ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder of installed packages that holds the example only, from a wheel."""
    pytest.importorskip("hatchling", reason="building a wheel needs hatchling")
    project, folder = tmp_path_factory.mktemp("project") / EXAMPLE.name, tmp_path_factory.mktemp("site-packages")
    shutil.copytree(EXAMPLE, project, ignore=shutil.ignore_patterns("__pycache__", ".pytest_cache", "dist"))
    run([sys.executable, "-m", "hatchling", "build", "-t", "wheel"], cwd=project)
    (wheel,) = (project / "dist").glob("*.whl")
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    assert names == ["lightning_peft_ia3.py"]
    pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-index"]
    run([sys.executable, *pip, "--target", str(folder), str(wheel)])
    return folder


def run(command, cwd=None, **environment):
    """Run a program and return what it prints; its errors are those of the test."""
    settings = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PIP_NO_INPUT": "1", **environment}
    clean = {key: value for key, value in os.environ.items() if key not in ("LIGHTNING_PEFT_PLUGINS", "PYTHONPATH")}
    done = subprocess.run(command, cwd=cwd, env={**clean, **settings}, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def program(installed, *arguments, **environment):
    return run([sys.executable, "-m", "lightning_peft.cli", *arguments], PYTHONPATH=str(installed), **environment)


def test_the_package_does_not_know_the_plugin():
    for path in Path(lightning_peft.__file__).parent.rglob("*.py"):
        assert "ia3" not in path.read_text(encoding="utf-8").lower(), f"{path} names the third-party method"


def test_an_installed_plugin_is_listed(installed):
    (row,) = (line for line in program(installed, "methods").splitlines() if " ia3 " in line)
    assert "lightning-peft-ia3 0.1.0" in row
    assert "IA3" in row
    assert "key, value, down" in row
    (row,) = (line for line in program(installed, "plugins").splitlines() if "ia3" in line)
    assert "lightning-peft-ia3 0.1.0 (ia3 = lightning_peft_ia3)" in row
    assert "method: ia3" in row
    assert "ok" in row


@pytest.mark.parametrize(("allowed", "listed"), [("", False), ("lightning-peft-ia3", True), ("ia3", True)])
def test_the_allow_list_decides(installed, allowed, listed):
    output = program(installed, "methods", LIGHTNING_PEFT_PLUGINS=allowed)
    assert (" ia3 " in output) is listed
    assert " lora " in output


def test_it_trains_from_yaml(ia3, installed, llama_dir, llama, tmp_path):
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    (tmp_path / "run.yaml").write_text(f"""\
seed_everything: 1
trainer:
  accelerator: cpu
  devices: 1
  max_steps: 4
  logger: false
  enable_progress_bar: false
  default_root_dir: {tmp_path}
  callbacks:
    - class_path: AdapterCheckpoint
      init_args: {{dirpath: {tmp_path}/run, save_last: true, every_n_train_steps: 4}}
model:
  base:
    class_path: CausalLMLoader
    init_args: {{path: {llama_dir}}}
  method:
    class_path: IA3
    init_args: {{feedforward: [down, up]}}
  targets: [key, up, down]
  optimizer:
    class_path: AdamW
    init_args: {{lr: 0.01}}
data:
  class_path: TextDataModule
  init_args: {{tokenizer: {llama_dir}, train: {tmp_path}/text.txt, block_size: 16, batch_size: 4}}
""")
    program(installed, "fit", "--config", str(tmp_path / "run.yaml"))
    loaded = load_adapter(llama, tmp_path / "run" / "last.adapter")
    assert loaded.method == ia3.IA3(feedforward=["down", "up"])
    tensors = safetensors.torch.load_file(tmp_path / "run" / "last.adapter" / "adapter_model.safetensors")
    assert {key.split(".")[-2]: tuple(tensor.shape) for key, tensor in tensors.items()} == {
        "k_proj": (16, 1),
        "up_proj": (1, 32),
        "down_proj": (1, 48),
    }
    assert all((tensor != 1).any() for tensor in tensors.values())


def test_its_own_test_runs_where_it_is_installed(installed, tmp_path):
    # All of its cases run in test_example_conformance.py.
    shutil.copy(EXAMPLE / "test_ia3.py", tmp_path)
    cases = ["-k", "fresh or survive or saved_and_loaded"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error", *cases, "test_ia3.py"]
    output = run(command, cwd=tmp_path, PYTHONPATH=str(installed))
    assert " passed" in output
    assert "failed" not in output


def test_without_the_plugin_its_folders_say_what_is_missing(ia3, tmp_path):
    model = tiny_llama()
    inject(model, ia3.IA3())
    save_adapter(model, tmp_path)
    with (
        mock.patch.dict(get_registry().methods, {"lora": LoRA}, clear=True),
        pytest.raises(AdapterConfigError, match="unknown method 'ia3'"),
    ):
        load_adapter(tiny_llama(), tmp_path)
