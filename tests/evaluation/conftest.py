"""Fixtures of the tests of evaluation: stories260k with a LoRA that does something, and task files that read local data."""

import os

import pytest
import torch

from lightning_peft import CausalLMLoader, LoRA, inject


@pytest.fixture(scope="session")
def stories(data_dir):
    """The folder of a small pretrained Llama."""
    return str(data_dir / "models" / "stories260k")


@pytest.fixture
def adapted(stories):
    """That model with a LoRA whose B is not zero, so that disabling it changes what the model says."""
    model = CausalLMLoader(path=stories).load().eval()
    torch.manual_seed(3)
    inject(model, LoRA(rank=2), ["query", "value"])
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture(scope="session")
def task_files(data_dir, tmp_path_factory):
    """A folder of task files for the harness: ARC-Challenge, BLiMP, SVAMP and stories of the local data."""
    folder = tmp_path_factory.mktemp("tasks")
    before = os.environ.get("HF_DATASETS_CACHE")
    import datasets

    cache, datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE, tmp_path_factory.mktemp("cache")
    head = "task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {file}}}}}\ntest_split: test\n"
    metric = "  - {{metric: {0}, aggregation: mean, higher_is_better: true}}\n"
    (folder / "arc.yaml").write_text(
        head.format(name="local_arc", file=data_dir / "mc" / "arc_challenge_dev.jsonl")
        + 'output_type: multiple_choice\ndoc_to_text: "Question: {{question}}\\nAnswer:"\ndoc_to_target: label\n'
        + 'doc_to_choice: "{{choices}}"\nmetric_list:\n' + metric.format("acc") + metric.format("acc_norm")
    )  # fmt: skip
    (folder / "blimp.yaml").write_text(
        head.format(name="local_blimp", file=data_dir / "mc" / "blimp_dev.jsonl")
        + 'output_type: multiple_choice\ndoc_to_text: ""\ntarget_delimiter: ""\ndoc_to_target: 0\n'
        + 'doc_to_choice: "{{[good, bad]}}"\nmetric_list:\n' + metric.format("acc")
    )  # fmt: skip
    (folder / "svamp.yaml").write_text(
        head.format(name="local_svamp", file=data_dir / "math" / "svamp.jsonl")
        + 'output_type: generate_until\ndoc_to_text: "Question: {{Body}} {{Question}}\\nAnswer:"\n'
        + 'doc_to_target: "{{Answer}}"\ngeneration_kwargs: {until: ["\\n"], do_sample: false, max_gen_toks: 12}\n'
        + "metric_list:\n" + metric.format("exact_match")
    )  # fmt: skip
    (folder / "stories.yaml").write_text(
        head.format(name="local_stories", file=data_dir / "lm" / "tinystories_valid.jsonl")
        + 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\nmetric_list:\n'
        + "  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}\n"
    )
    yield str(folder)
    datasets.config.HF_DATASETS_CACHE = cache
    assert os.environ.get("HF_DATASETS_CACHE") == before
