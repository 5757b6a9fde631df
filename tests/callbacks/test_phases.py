"""PhaseSchedule: what acts and what is trained in each phase, and runs that resume in the midst of one."""

import pytest
import torch
from lightning.pytorch import Callback, LightningModule

from lightning_peft import (
    PEFTCLI,
    Adaptation,
    AdapterCheckpoint,
    BitFit,
    FullFineTuning,
    LoRA,
    NormTuning,
    PEFTMixin,
    PEFTModule,
    Phase,
    PhaseSchedule,
    active_adapters,
    adapter_layers,
    adapter_names,
    adapter_state_dict,
    inject,
    load_adapters,
    set_active_adapters,
)
from lightning_peft.errors import CheckpointMismatchError, ConfigError
from lightning_peft.testing import tiny_llama

EPOCHS = [
    Phase(start=0, active=["norms"]),
    Phase(start=1, active=["lora", "norms"], trained=["lora:*.layers.1"]),
    Phase(start=3),
]
STEPS = [
    Phase(start=0, unit="step", active=["norms"]),
    Phase(start=4, unit="step", active=["lora", "norms"], trained=["lora:*.layers.1"]),
    Phase(start=9, unit="step"),
]


def lm(optimizer=None, method=None):
    method = method or [
        Adaptation(LoRA(rank=2, dropout=0.1), ["q_proj", "v_proj"], "lora"),
        Adaptation(NormTuning(), "norm", "norms"),
        Adaptation(BitFit(add_missing=True), "q_proj", "bitfit"),
    ]
    # Momentum and weight decay: what moves parameters that have no gradient, if anything does.
    return PEFTModule(
        tiny_llama(), method, optimizer=optimizer or (lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1))
    )


def tokens(shuffle=True):
    generator = torch.Generator().manual_seed(0)
    return torch.utils.data.DataLoader(
        torch.randint(0, 128, (12, 8), generator=generator), batch_size=4, shuffle=shuffle
    )


class Recorder(Callback):
    """Notes after every step what is active, what moved, and which tensors have gradients."""

    def __init__(self):
        self.active, self.moved, self.phases, self._before = [], [], [], None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self._before = state(pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        after = state(pl_module)
        self.moved.append({key for key in after if not torch.equal(after[key], self._before[key])})
        self.active.append(active_adapters(pl_module.model))
        self.phases.append(trainer.callback_metrics.get("phase"))


def state(module):
    return {
        f"{name}:{key}": value.clone()
        for name in adapter_names(module.model)
        for key, value in adapter_state_dict(module.model, name).items()
    }


def fit(trainer, module, **options):
    torch.manual_seed(5)
    trainer.fit(module, tokens(), **options)
    return module


def kinds(moved):
    return {key.partition(":")[0] for key in moved}


@pytest.fixture
def quiet_trainer(make_trainer):
    def make(root, **options):
        return make_trainer(root, enable_checkpointing=False, **options)

    return make


@pytest.mark.parametrize(
    "optimizer",
    [
        None,
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.RMSprop(p, lr=1e-2, momentum=0.9, weight_decay=0.1),
    ],
    ids=["AdamW", "SGD", "RMSprop"],
)
def test_only_what_a_phase_trains_moves(tmp_path, quiet_trainer, optimizer):
    phases = [
        Phase(start=0, active=["norms"]),
        Phase(start=1, active=["lora", "norms"], trained=["lora:*.layers.1"]),
        Phase(start=2, active=["lora"], trained=["lora:re:.*q_proj"]),
        Phase(start=3),
    ]
    recorder = Recorder()
    fit(quiet_trainer(tmp_path, max_epochs=4, callbacks=[PhaseSchedule(phases), recorder]), lm(optimizer))
    assert (
        recorder.active
        == [["norms"]] * 3 + [["lora", "norms"]] * 3 + [["lora"]] * 3 + [["lora", "norms", "bitfit"]] * 3
    )
    for step, moved in enumerate(recorder.moved):
        if step < 3:
            assert kinds(moved) == {"norms"}
        elif step < 6:
            assert kinds(moved) == {"lora"}
            assert all(".layers.1." in key for key in moved)
        elif step < 9:
            assert kinds(moved) == {"lora"}
            assert all("q_proj" in key for key in moved)
            assert any(".layers.0." in key for key in moved)
        else:
            assert kinds(moved) == {"lora", "norms", "bitfit"}
    assert [float(phase) for phase in recorder.phases] == [0.0] * 3 + [1.0] * 3 + [2.0] * 3 + [3.0] * 3


def test_stale_momentum_would_have_moved_them():
    """What the test above relies on: with a gradient of zero instead of none, momentum and decay do move a parameter."""
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    parameter.grad = torch.ones(2)
    optimizer.step()
    before = parameter.detach().clone()
    parameter.grad = torch.zeros(2)
    optimizer.step()
    assert not torch.equal(parameter, before)


def test_steps_count_steps_of_the_optimizer(tmp_path, quiet_trainer):
    recorder = Recorder()
    phases = [Phase(start=0, unit="step", active=["norms"]), Phase(start=2, unit="step", active=["lora"])]
    trainer = quiet_trainer(
        tmp_path, max_epochs=2, accumulate_grad_batches=3, callbacks=[PhaseSchedule(phases), recorder]
    )
    module = PEFTModule(
        tiny_llama(), [Adaptation(LoRA(rank=1), "q_proj", "lora"), Adaptation(NormTuning(), "norm", "norms")]
    )
    torch.manual_seed(5)
    loader = torch.utils.data.DataLoader(torch.randint(0, 128, (24, 8)), batch_size=4)  # two steps an epoch
    trainer.fit(module, loader)
    assert recorder.active == [["norms"]] * 6 + [["lora"]] * 6
    assert [kinds(moved) for moved in recorder.moved] == [
        *[set(), set(), {"norms"}] * 2,
        *[set(), set(), {"lora"}] * 2,
    ]


@pytest.mark.parametrize("phases", [EPOCHS, STEPS], ids=["epochs", "steps"])
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_run_that_resumes_in_the_midst_is_bit_for_bit_the_uninterrupted_one(tmp_path, quiet_trainer, phases, stop):
    def callbacks():
        return [PhaseSchedule(phases)]

    whole = fit(quiet_trainer(tmp_path, max_epochs=4, callbacks=callbacks()), lm())
    first = quiet_trainer(tmp_path, max_epochs=stop, callbacks=callbacks())
    fit(first, lm())
    first.save_checkpoint(tmp_path / "part.ckpt")
    recorder = Recorder()
    resumed = fit(
        quiet_trainer(tmp_path, max_epochs=4, callbacks=[*callbacks(), recorder]),
        lm(),
        ckpt_path=tmp_path / "part.ckpt",
    )
    assert len(recorder.moved) == 3 * (4 - stop)
    expected, found = state(whole), state(resumed)
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert active_adapters(resumed.model) == active_adapters(whole.model)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_a_run_resumes_within_an_epoch_at_the_step_of_its_phase(tmp_path, quiet_trainer):
    """The loader draws no random numbers here, so the batches of the rest of the epoch are the same."""
    rows = torch.randint(0, 128, (24, 8), generator=torch.Generator().manual_seed(0))

    class Loader:
        """Resumable: remembers its position."""

        def __init__(self):
            self.done = 0

        def __len__(self):
            return 6

        def __iter__(self):
            start, self.done = self.done, 0
            for number in range(start, 6):
                self.done = (number + 1) % 6
                yield rows[number * 4 : number * 4 + 4]

        def state_dict(self):
            return {"done": self.done}

        def load_state_dict(self, held):
            self.done = held["done"]

    def run(steps, **options):
        module = lm()
        trainer = quiet_trainer(tmp_path, max_steps=steps, callbacks=[PhaseSchedule(STEPS)])
        torch.manual_seed(5)
        trainer.fit(module, Loader(), **options)
        return trainer, module

    _, whole = run(12)
    trainer, _ = run(5)  # phase 1 began with step 4
    trainer.save_checkpoint(tmp_path / "part.ckpt")
    _, resumed = run(12, ckpt_path=tmp_path / "part.ckpt")
    expected, found = state(whole), state(resumed)
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_gradual_unfreezing_of_a_model_trained_in_full(tmp_path, quiet_trainer):
    phases = [
        Phase(start=0, trained=["full:lm_head"]),
        Phase(start=1, trained=["full:lm_head", "full:model.layers.1"]),
        Phase(start=2, trained=["full:re:model\\.layers\\..*", "full:head", "full:model.norm"]),
    ]
    recorder = Recorder()
    method = [Adaptation(FullFineTuning())]
    fit(quiet_trainer(tmp_path, max_epochs=3, callbacks=[PhaseSchedule(phases), recorder]), lm(method=method))
    assert all(moved == {"full:lm_head.weight"} for moved in recorder.moved[:3])
    assert all(
        key.startswith(("full:lm_head", "full:model.layers.1.")) for moved in recorder.moved[3:6] for key in moved
    )
    assert any("layers.1.self_attn" in key for key in recorder.moved[3])
    assert any("layers.0." in key for key in recorder.moved[6])
    assert not any("embed_tokens" in key for key in recorder.moved[6])


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_checkpoint_is_evaluated_with_the_adapters_of_its_phase(tmp_path, quiet_trainer):
    trainer = quiet_trainer(tmp_path, max_epochs=2, callbacks=[PhaseSchedule(EPOCHS)])
    fit(trainer, lm())
    trainer.save_checkpoint(tmp_path / "part.ckpt")
    module = lm()
    quiet_trainer(tmp_path).validate(module, tokens(shuffle=False), ckpt_path=tmp_path / "part.ckpt", verbose=False)
    assert active_adapters(module.model) == ["lora", "norms"]


def test_the_folder_beside_a_checkpoint_says_what_was_active(tmp_path, make_trainer):
    callbacks = [PhaseSchedule(EPOCHS), AdapterCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)]
    module = fit(make_trainer(tmp_path, max_epochs=2, callbacks=callbacks), lm())
    again = tiny_llama()
    loaded = load_adapters(again, tmp_path / "epoch=1.adapter")
    assert list(loaded) == ["lora", "norms", "bitfit"]
    assert active_adapters(again) == ["lora", "norms"] == active_adapters(module.model)
    first = tiny_llama()
    load_adapters(first, tmp_path / "epoch=0.adapter")
    assert active_adapters(first) == ["norms"]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_run_without_the_phases_does_not_resume_and_neither_one_with_others(tmp_path, quiet_trainer):
    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[PhaseSchedule(EPOCHS)])
    fit(trainer, lm())
    trainer.save_checkpoint(tmp_path / "with.ckpt")
    plain = quiet_trainer(tmp_path, max_epochs=1)
    fit(plain, lm())
    plain.save_checkpoint(tmp_path / "without.ckpt")
    with pytest.raises(CheckpointMismatchError, match="was saved with a PhaseSchedule, and this run is without one"):
        fit(quiet_trainer(tmp_path, max_epochs=2), lm(), ckpt_path=tmp_path / "with.ckpt")
    with pytest.raises(CheckpointMismatchError, match="was saved without a PhaseSchedule, and this run is with one"):
        fit(
            quiet_trainer(tmp_path, max_epochs=2, callbacks=[PhaseSchedule(EPOCHS)]),
            lm(),
            ckpt_path=tmp_path / "without.ckpt",
        )
    with pytest.raises(
        CheckpointMismatchError, match=r"a run with the phases .*'start': 3.* this one has .*'start': 2"
    ):
        fit(
            quiet_trainer(tmp_path, max_epochs=2, callbacks=[PhaseSchedule([*EPOCHS[:2], Phase(start=2)])]),
            lm(),
            ckpt_path=tmp_path / "with.ckpt",
        )


def test_a_model_that_was_trained_in_phases_is_trained_so_again(tmp_path, quiet_trainer):
    phases = [Phase(start=0, active=["norms"]), Phase(start=1, active=["lora"])]
    module = lm()
    for _ in range(2):
        recorder = Recorder()
        fit(quiet_trainer(tmp_path, max_epochs=2, callbacks=[PhaseSchedule(phases), recorder]), module)
        assert [kinds(moved) for moved in recorder.moved] == [{"norms"}] * 3 + [{"lora"}] * 3


def test_a_module_of_ones_own_is_trained_in_phases(tmp_path, quiet_trainer):
    class Own(PEFTMixin, LightningModule):
        def __init__(self, both):
            super().__init__()
            self.model, self.both = None, both

        def configure_model(self):
            if self.model is None:
                self.model = tiny_llama().train()
                inject(self.model, LoRA(rank=1), "q_proj", name="lora")
                inject(self.model, LoRA(rank=1), "v_proj", name="other")
                set_active_adapters(self.model, ["lora", "other"] if self.both else "other")

        def training_step(self, batch):
            return self.model(input_ids=batch, labels=batch).loss

        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    phases = [Phase(start=0, active=["lora"]), Phase(start=1, active=["other"])]
    recorder = Recorder()
    module = Own(both=True)
    fit(quiet_trainer(tmp_path, max_epochs=2, callbacks=[PhaseSchedule(phases), recorder]), module)
    assert [kinds(moved) for moved in recorder.moved] == [{"lora"}] * 3 + [{"other"}] * 3
    module = Own(both=False)
    with pytest.raises(
        ConfigError, match="phase 0 trains the adapter 'lora', but the optimizer does not have all of its"
    ):
        fit(quiet_trainer(tmp_path, max_epochs=2, callbacks=[PhaseSchedule(phases)]), module)


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("phase", "message"),
    [
        (Phase(start=2, active=["lra"]), "phase 1 names the adapter 'lra', but there are: lora, norms, bitfit"),
        (Phase(start=2, trained=["lra"]), "phase 1 names the adapter 'lra', but there are: lora, norms, bitfit"),
        (
            Phase(start=2, trained=["lora:layers.7"]),
            r"phase 1 trains 'lora' at 'layers.7', which names none of its 4 places: model.layers.0.self_attn.q_proj, ",
        ),
        (
            Phase(start=2, trained=["lora:k_proj"]),
            "phase 1 trains 'lora' at 'k_proj', which names none of its 4 places",
        ),
        (Phase(start=2, active=[]), r"phase 1 trains nothing: trained=None, active=\[\]"),
    ],
)
def test_an_unknown_name_or_place_is_refused_before_training(tmp_path, quiet_trainer, phase, message):
    recorder = Recorder()
    with pytest.raises(ConfigError, match=message):
        fit(quiet_trainer(tmp_path, max_epochs=3, callbacks=[PhaseSchedule([Phase(start=0), phase]), recorder]), lm())
    assert not recorder.moved


def test_adapters_that_cannot_act_together_are_refused_before_training(tmp_path, quiet_trainer):
    class Apart(PEFTModule):
        def configure_model(self):
            if self.model is None:
                super().configure_model()
                inject(self.model, NormTuning(), "norm", name="second")

    module = Apart(tiny_llama(), [Adaptation(NormTuning(), "norm", "first")])
    with pytest.raises(
        ConfigError, match=r"phase 0 cannot be: \['first', 'second'\] are all at 'model.layers.0.input_layer"
    ):
        fit(quiet_trainer(tmp_path, max_epochs=1, callbacks=[PhaseSchedule([Phase(start=0)])]), module)


def test_tied_weights_are_trained_where_the_first_of_them_is(tmp_path, quiet_trainer):
    module = PEFTModule(tiny_llama(tie_word_embeddings=True), [FullFineTuning()])
    phases = [Phase(start=0, trained=["full:lm_head"])]
    with pytest.raises(ConfigError, match="phase 0 trains 'full' at 'lm_head', where it has no parameters of its own"):
        fit(quiet_trainer(tmp_path, max_epochs=1, callbacks=[PhaseSchedule(phases)]), module)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"start": -1}, "Phase start must be an epoch or a step, 0 or more, got -1"),
        ({"start": True}, "got True"),
        ({"start": 0, "unit": "hour"}, "Phase unit must be 'epoch' or 'step', got 'hour'"),
        ({"start": 0, "active": "lora"}, "Phase active must be a list of names, got 'lora'"),
        ({"start": 0, "trained": [3]}, r"Phase trained must be a list of names, got \[3\]"),
        (
            {"start": 0, "active": ["a"], "trained": ["b:x"]},
            r"Phase trained names 'b', which is not among its active \['a'\]",
        ),
    ],
)
def test_a_phase_that_makes_no_sense_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        Phase(**fields)


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ([], r"needs a list of Phase\(start=...\), got \[\]"),
        ([{"start": 0}], r"needs a list of Phase\(start=...\), got \[{'start': 0}\]"),
        ([Phase(start=1)], r"must start with 0 and each later than the one before, got \[1\]"),
        ([Phase(start=0), Phase(start=2), Phase(start=2)], r"got \[0, 2, 2\]"),
        ([Phase(start=0), Phase(start=2, unit="step")], r"must count in one unit, got \['epoch', 'step'\]"),
    ],
)
def test_phases_without_an_order_are_refused(phases, message):
    with pytest.raises(ConfigError, match=message):
        PhaseSchedule(phases)


def test_several_processes_are_refused(tmp_path, quiet_trainer):
    trainer = quiet_trainer(tmp_path, max_epochs=1, strategy="ddp", callbacks=[PhaseSchedule(EPOCHS)])
    with pytest.raises(ConfigError, match="runs in one process on one device, but the strategy is DDPStrategy"):
        PhaseSchedule(EPOCHS).setup(trainer, lm(), "fit")


def test_an_optimizer_that_moves_parameters_without_gradients_is_refused(tmp_path, quiet_trainer):
    def lbfgs(groups):
        return torch.optim.LBFGS([p for group in groups for p in group["params"]])

    with pytest.raises(ConfigError, match="leaves parameters without a gradient alone; LBFGS moves them too"):
        fit(quiet_trainer(tmp_path, max_epochs=1, callbacks=[PhaseSchedule(EPOCHS)]), lm(lbfgs))


def test_a_model_without_adapters_is_refused(tmp_path, quiet_trainer):
    class Bare(LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(8, 1)

        def training_step(self, batch):
            return self.layer(batch.float()).mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.raises(ConfigError, match="PhaseSchedule found no adapter in Bare; inject them in configure_model"):
        fit(quiet_trainer(tmp_path, max_epochs=1, callbacks=[PhaseSchedule([Phase(start=0)])]), Bare())


def test_phases_are_made_from_yaml(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "model:\n  base: {class_path: CausalLMLoader, init_args: {path: x}}\n  method: [lora, bitfit]\n"
        "data: {class_path: TextDataModule, init_args: {tokenizer: x, train: y}}\n"
        "trainer:\n  accelerator: cpu\n  logger: false\n  callbacks:\n    - class_path: PhaseSchedule\n      init_args:\n"
        "        phases:\n          - {start: 0, unit: step, active: [lora], trained: ['lora:*.layers.1']}\n"
        "          - {start: 30, unit: step}\n"
    )
    cli = PEFTCLI(args=["--config", str(file)], run=False)
    schedule = next(callback for callback in cli.trainer.callbacks if isinstance(callback, PhaseSchedule))
    assert schedule.phases == (
        Phase(start=0, unit="step", active=["lora"], trained=["lora:*.layers.1"]),
        Phase(start=30, unit="step"),
    )


def test_layers_keep_what_a_phase_froze_when_they_are_switched(tmp_path, quiet_trainer):
    from lightning_peft import adapters_disabled

    module = fit(quiet_trainer(tmp_path, max_epochs=2, callbacks=[PhaseSchedule(EPOCHS)]), lm())
    with adapters_disabled(module.model):
        pass
    trained = [
        path for path, layer in adapter_layers(module.model).items() if any(p.requires_grad for p in layer.parameters())
    ]
    assert trained == ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"]


def test_a_method_acts_after_a_step_only_in_phases_that_train_it(tmp_path, quiet_trainer):
    steps = []

    class Counting(LoRA):
        name = "counting"

        def after_optimizer_step(self, adapters, optimizer, step, total_steps):
            steps.append(step)

    method = [Adaptation(Counting(rank=1), "q_proj", "lora"), Adaptation(NormTuning(), "norm", "norms")]
    phases = [Phase(start=0, trained=["norms"]), Phase(start=1)]
    fit(quiet_trainer(tmp_path, max_epochs=2, callbacks=[PhaseSchedule(phases)]), lm(method=method))
    assert steps == [3, 4, 5]
