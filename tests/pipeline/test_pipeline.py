"""Stages that build on each other: what they learn from, what is done again and what is not."""

import io
import json
import time
from dataclasses import replace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from safetensors.torch import load_file
from torch import nn

from lightning_distill import KD, CausalLM, Experiment, Pipeline, ProgressiveStage, QADModule, Stage
from lightning_distill.callbacks.stage_checkpoint import checkpoints
from lightning_distill.datamodules import TensorDataModule
from lightning_distill.files import content_hash
from lightning_distill.locks import only_process
from lightning_distill.networks import from_config
from lightning_distill.pipeline.running import alone
from lightning_distill.quantization import QuantSpec
from lightning_distill.residual import ResidualEnsemble
from lightning_distill.stages import Earlier, EarlierStage, earlier_stages, shortened, stage_network
from tests.pipeline.parts import CPU, SGD, chain, data, experiment, net, student, teacher

QUIET = Console(file=io.StringIO())


def weights(folder, stage):
    found = load_file(folder / stage / "student.safetensors")  # mapped
    return {name: value.clone() for name, value in found.items()}


def manifest(folder):
    """What is written of each stage, in the order in which they were begun."""
    found = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("*/manifest.json")}
    return dict(sorted(found.items(), key=lambda item: len(item[1]["earlier"])))


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    begin = time.perf_counter()
    return folder, chain().run(folder, console=QUIET), time.perf_counter() - begin


@pytest.mark.chapter("C07", api="lightning_distill.Pipeline")
def test_each_stage_learns_from_the_best_of_the_one_before(done, tmp_path):
    folder, _, _ = done
    records = manifest(folder)
    assert list(records) == ["teacher", "assistant", "last"]
    for name, record in records.items():
        assert record["weights"] == content_hash(folder / name / "student.safetensors")
        best = max(checkpoints(folder / name / "checkpoints"), key=lambda saved: saved.value)
        assert record["metric"] == best.value
        state = torch.load(best.path, weights_only=True)["state_dict"]
        assert_same({key.removeprefix("student."): value for key, value in state.items()}, weights(folder, name))
    assert records["last"]["earlier"] == {name: records[name]["weights"] for name in ("teacher", "assistant")}

    seen = []

    def build(earlier):
        seen.extend(stage.name for stage in earlier)
        module = ProgressiveStage(net(4), optimizer=SGD)
        assert_same(module.teacher.network.state_dict(), weights(folder, "assistant"))
        return experiment(module)

    stages = chain().stages
    Pipeline([*stages[:2], replace(stages[2], build=build)]).run(folder, console=QUIET)
    assert seen == ["teacher", "assistant"]


@pytest.mark.chapter("C14", api="lightning_distill.ProgressiveStage")
def test_a_pipeline_is_kd_again_and_again(done):
    folder, _, _ = done
    taught = None
    for name, width in (("teacher", 16), ("assistant", 8), ("last", 4)):
        L.seed_everything(0, workers=True, verbose=False)
        module = KD(net(width), taught, alpha=1.0 if taught is None else 0.3, optimizer=SGD)
        one = experiment(module, logger=False, enable_checkpointing=False, enable_model_summary=False)
        trainer = L.Trainer(**one.trainer)
        seen = Best()
        trainer.callbacks.append(seen)
        trainer.fit(module, datamodule=one.datamodule)
        assert_same(seen.best, weights(folder, name))
        taught = net(width)
        taught.load_state_dict(seen.best)


class Best(Callback):
    def __init__(self):
        self.value, self.best = -1.0, None

    def on_train_epoch_end(self, trainer, pl_module):
        value = float(trainer.callback_metrics["val/accuracy"])
        if value > self.value:
            self.value = value
            self.best = {name: tensor.clone() for name, tensor in pl_module.student.state_dict().items()}


class Counts(Callback):
    """Counts steps, and fails at one."""

    steps = 0

    def __init__(self, fail_at=None):
        self._fail_at = fail_at

    def on_train_batch_end(self, trainer, pl_module, *rest):
        Counts.steps += 1
        if trainer.global_step == self._fail_at:
            raise RuntimeError("power failure")


def counted(fail_in=None, fail_at=None):
    stages = []
    for stage in chain().stages:

        def build(earlier, stage=stage):
            made = stage.build(earlier)
            counts = Counts(fail_at if stage.name == fail_in else None)
            return replace(made, trainer={**made.trainer, "callbacks": [counts]})

        stages.append(replace(stage, build=build, save_every_n_steps=2))
    return Pipeline(stages)


@pytest.mark.chapter("C18", api="lightning_distill.callbacks.StageCheckpoint")
@pytest.mark.parametrize("fail_at", [3, 5, 9])  # in mid-epoch, before an epoch's end, in the second epoch
@pytest.mark.parametrize("fail_in", ["assistant", "last"])
def test_an_interrupted_pipeline_ends_like_an_uninterrupted_one(done, tmp_path, fail_in, fail_at):
    folder, report, _ = done
    with pytest.raises(RuntimeError, match="power failure"):
        counted(fail_in, fail_at).run(tmp_path, console=QUIET)
    assert not manifest(tmp_path)[fail_in]["finished"]
    Counts.steps = 0
    again = counted().run(tmp_path, console=QUIET)
    left = {"assistant": 20, "last": 10}[fail_in] - {3: 2, 5: 4, 9: 8}[fail_at]
    assert Counts.steps == left
    for name in ("teacher", "assistant", "last"):
        assert_same(weights(folder, name), weights(tmp_path, name))
    assert [stage.metrics for stage in again.stages] == [stage.metrics for stage in report.stages]


@pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")
@pytest.mark.parametrize("validation", [False, True])
def test_data_without_a_test_set_are_enough(tmp_path, validation):
    def build(earlier):
        splits = data().splits
        less = TensorDataModule(splits.train, splits.validation if validation else None, batch_size=8)
        return Experiment(KD(net(8), alpha=1.0, optimizer=SGD), less, CPU)

    (reached,) = Pipeline([Stage("only", build)]).run(tmp_path, console=QUIET).stages
    assert reached.test is None
    assert (reached.metric is not None) == validation
    assert {name.split("/")[0] for name in reached.metrics} == ({"val"} if validation else set())


def test_what_is_finished_is_not_trained_again(tmp_path):
    first = counted().run(tmp_path, console=QUIET)
    Counts.steps = 0
    text = io.StringIO()
    assert counted().run(tmp_path, console=Console(file=text)) == first
    assert Counts.steps == 0
    assert text.getvalue() == ""


def test_stages_are_trained_anew_on_demand_and_nothing_is_lost(tmp_path):
    counted().run(tmp_path, console=QUIET)
    before = weights(tmp_path, "assistant")
    Counts.steps = 0
    counted().run(tmp_path, start_stage="assistant", console=QUIET)
    assert Counts.steps == 20
    assert_same(weights(tmp_path, "assistant.replaced-1"), before)
    assert (tmp_path / "last.replaced-1" / "checkpoints").is_dir()
    assert not (tmp_path / "teacher.replaced-1").exists()
    with pytest.raises(ValueError, match="`start_stage` must be one of 'teacher', 'assistant', 'last', got 'student'"):
        counted().run(tmp_path, start_stage="student", console=QUIET)
    with pytest.raises(ValueError, match="but the stage 'teacher' before it is not finished"):
        counted().run(tmp_path / "empty", start_stage="last", console=QUIET)


def test_a_folder_has_one_pipeline_at_a_time(tmp_path):
    with (
        only_process(tmp_path, "pipeline"),
        pytest.raises(BlockingIOError, match=r"The pipeline in \S+ is in use by the process \d+\. Wait"),
    ):
        counted().run(tmp_path, start_stage="teacher", console=QUIET)
    with (
        only_process(tmp_path / "teacher", "stage"),
        pytest.raises(BlockingIOError, match=r"The stage in \S+teacher is in use by the process"),
    ):
        counted().run(tmp_path, console=QUIET)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["running.lock", "teacher"]
    assert [path.name for path in (tmp_path / "teacher").iterdir()] == ["running.lock"]  # nothing was begun


def test_processes_of_another_machine_leave_the_lock_to_the_first(tmp_path, monkeypatch):
    monkeypatch.setenv("NODE_RANK", "1")
    with only_process(tmp_path, "pipeline"), alone(tmp_path, "pipeline"):
        pass


def damage(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_damaged_network_is_made_again_from_the_checkpoints(tmp_path):
    counted().run(tmp_path, console=QUIET)
    before = weights(tmp_path, "assistant")
    damage(tmp_path / "assistant" / "student.safetensors")
    Counts.steps = 0
    with pytest.warns(UserWarning, match=r"student.safetensors is damaged or gone.*made again"):
        counted().run(tmp_path, console=QUIET)
    assert Counts.steps == 0
    assert_same(weights(tmp_path, "assistant"), before)


def test_a_damaged_checkpoint_is_passed_over(done, tmp_path):
    with pytest.raises(RuntimeError, match="power failure"):
        counted("assistant", 9).run(tmp_path, console=QUIET)
    *_, newest = checkpoints(tmp_path / "assistant" / "checkpoints")
    damage(newest.path)
    Counts.steps = 0
    with pytest.warns(UserWarning, match=r"step000000008.ckpt is damaged or gone.*The one before it is used"):
        counted().run(tmp_path, console=QUIET)
    assert Counts.steps == 2 * 10 - 6
    assert_same(weights(done[0], "last"), weights(tmp_path, "last"))


def test_a_changed_configuration_is_refused_by_stage_and_key(tmp_path):
    Pipeline([teacher(), student("last", 4)]).run(tmp_path, console=QUIET)
    message = r"The stage 'last' .* was trained with another configuration: `module.alpha` was 0.3, is 0.5"
    with pytest.raises(ValueError, match=message):
        Pipeline([teacher(), student("last", 4, alpha=0.5)]).run(tmp_path, console=QUIET)
    with pytest.raises(ValueError, match=r"'teacher' .* another configuration: `trainer.max_epochs` was 2, is 3"):
        Pipeline([teacher(max_epochs=3), student("last", 4)]).run(tmp_path, console=QUIET)
    with pytest.raises(ValueError, match=r"another configuration: `weights.number`"):
        Pipeline([teacher(), student("last", 5)]).run(tmp_path, console=QUIET)
    with pytest.raises(ValueError, match=r"'teacher' .* another configuration: `seed` was 0, is 1"):
        Pipeline([teacher(), student("last", 4)]).run(tmp_path, seed=1, console=QUIET)
    with pytest.raises(
        ValueError, match=r"'last' .* learnt from another network than the one that the stage 'between'"
    ):
        Pipeline([teacher(), student("between", 8), student("last", 4)]).run(tmp_path, console=QUIET)


def test_the_report_has_what_each_stage_keeps_and_costs(done):
    folder, report, elapsed = done
    first, middle, last = report.stages
    assert first.retention == 1
    assert last.retention == pytest.approx(last.metric / first.metric)
    assert [stage.parameters for stage in report.stages] == [6 * w + w + 3 * w + 3 for w in (16, 8, 4)]
    assert [stage.flops for stage in report.stages] == [2 * 9 * w for w in (16, 8, 4)]
    assert [stage.bytes for stage in report.stages] == [4 * stage.parameters for stage in report.stages]
    assert middle.steps == 10
    assert 0 < sum(stage.seconds for stage in report.stages) < elapsed
    assert middle.test == middle.metrics["test/accuracy"]
    stored = json.loads((folder / "report.json").read_text())
    assert [row["name"] for row in stored["stages"]] == ["teacher", "assistant", "last"]
    assert (folder / "report.png").stat().st_size > 5000
    text = io.StringIO()
    Console(file=text, width=120).print(report)
    assert "100.0%" in text.getvalue()
    assert "assistant" in text.getvalue()


def test_transformers_lose_layers_from_stage_to_stage(tmp_path):
    def gpt(layers):
        sizes = {"vocab_size": 40, "n_positions": 16, "n_embd": 8, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
        return from_config("gpt2", "causal-lm", {**sizes, "n_layer": layers})

    class Tokens(L.LightningDataModule):
        def train_dataloader(self):
            rows = torch.randint(40, (8, 12), generator=torch.Generator().manual_seed(1))
            return torch.utils.data.DataLoader([{"input_ids": row, "labels": row} for row in rows], batch_size=4)

        val_dataloader = train_dataloader

    def build(earlier, layers):
        network = shortened(layers) if earlier else gpt(layers)
        options = {"task": CausalLM(), "optimizer": SGD, "temperature": 1.0}
        module = ProgressiveStage(network, **options) if earlier else KD(network, alpha=1.0, **options)
        return replace(experiment(module), datamodule=Tokens())

    depths = {"six": 6, "three": 3, "two": [1, 3]}
    stages = [
        Stage(name, lambda earlier, layers=layers: build(earlier, layers), "val/nll", "min")
        for name, layers in depths.items()
    ]
    report = Pipeline(stages).run(tmp_path, console=QUIET)
    found = [{key.split(".")[2] for key in weights(tmp_path, name) if ".h." in key} for name in depths]
    assert [len(layers) for layers in found] == [6, 3, 2]
    assert report.stages[1].retention is None  # less is better
    with pytest.raises(ValueError, match="`layers` must be from 1 to 2, as many as the stage 'two' has in"):
        Pipeline([*stages, Stage("five", lambda earlier: build(earlier, 5), "val/nll", "min")]).run(
            tmp_path, console=QUIET
        )


def test_quantized_students_teach_each_other_with_fewer_and_fewer_bits(tmp_path):
    def quantized(bits):
        def build(earlier):
            student = earlier.first.copied()
            module = QADModule(student, earlier.previous.teacher(), QuantSpec(bits), alpha=0.0, optimizer=SGD)
            return experiment(module)

        return Stage(f"{bits} bits", build)

    stages = [teacher(), quantized(8), quantized(4)]
    report = Pipeline(stages).run(tmp_path, console=QUIET)
    eight, four = report.stages[1:]
    weights_of, rest = 16 * 6 + 3 * 16, 16 + 3  # weights, biases
    steps = 16 + 3
    assert eight.bytes == weights_of + 4 * rest + 4 * steps
    assert four.bytes == weights_of // 2 + 4 * rest + 4 * steps
    again = Pipeline(stages).run(tmp_path, console=QUIET)
    assert again == report
    found = {name for name in weights(tmp_path, "4-bits") if "scale" in name}
    assert found  # the steps are kept


# What a stage learns from


def earlier(*widths):
    return Earlier([EarlierStage(f"s{w}", net(w, seed=w).eval(), {"val/accuracy": 0.5 + w / 100}) for w in widths])


@pytest.mark.chapter("C20", api="lightning_distill.ProgressiveStage")
def test_reuse_weighs_the_stage_before_against_the_first():
    stages = earlier(16, 8, 6)
    module = ProgressiveStage(net(4), "reuse", reuse_alpha=0.7, earlier=stages)
    assert module.teacher.shares == pytest.approx([0.7, 0.3])
    for member, stage in zip(module.teacher.members, (stages.previous, stages.first), strict=True):
        assert_same(member.network.state_dict(), stage.network.state_dict())
    first = ProgressiveStage(net(4, seed=1), "reuse", reuse_alpha=0.0, earlier=stages)
    direct = KD(net(4, seed=1), stages.first.network)
    batch = next(iter(loaded()))
    for one, other in zip(gradient(first, batch), gradient(direct, batch), strict=True):
        torch.testing.assert_close(one, other)


def loaded():
    module = data()
    module.setup("fit")
    return module.val_dataloader()


def gradient(module, batch):
    module.student.eval()
    loss, _ = module.loss(module.observe(batch))
    return torch.autograd.grad(loss, [p for p in module.student.parameters() if p.requires_grad])


def test_ensembles_are_weighted_by_what_is_asked_for():
    stages = earlier(16, 8)
    options = {"transfer": "ensemble", "earlier": stages}
    assert ProgressiveStage(net(4), **options).teacher.shares == [0.5, 0.5]
    by_metric = ProgressiveStage(net(4), member_weights="performance", **options)
    assert by_metric.teacher.shares == pytest.approx([0.66 / 1.24, 0.58 / 1.24])
    by_size = ProgressiveStage(net(4), member_weights="complexity", **options)
    sizes = [163, 83]
    assert by_size.teacher.shares == pytest.approx([sizes[1] / sum(sizes), sizes[0] / sum(sizes)])
    assert ProgressiveStage(net(4), member_weights=[3, 1], **options).teacher.shares == [0.75, 0.25]


@pytest.mark.chapter("C15", api="lightning_distill.ProgressiveStage")
def test_residual_students_add_up(tmp_path):
    stages = [teacher(), *(student(name, 4, "residual", trainer={"max_epochs": 4}) for name in ("one", "two"))]
    Pipeline(stages).run(tmp_path, console=QUIET)
    one, two = weights(tmp_path, "one"), weights(tmp_path, "two")
    for name, value in one.items():
        assert torch.equal(two[f"members.0.{name}"], value)  # frozen
    module = ProgressiveStage(net(4), "residual", earlier=earlier(16, 8, 6))
    assert isinstance(module.student, ResidualEnsemble)
    assert len(module.student.members) == 2
    assert_same(module.teacher.network.state_dict(), net(16, seed=16).state_dict())
    again = ProgressiveStage(net(4), "residual", earlier=Earlier([*earlier(16), EarlierStage("sum", module.student)]))
    assert [type(member) for member in again.student.members] == [nn.Sequential] * 3


def test_networks_of_stages_are_copies():
    stages = earlier(16, 8)
    with earlier_stages(stages):
        for name, width in (("previous", 8), ("first", 16), ("s16", 16)):
            network = stage_network(name)
            assert network[0].out_features == width
            assert network.training
            assert all(parameter.requires_grad for parameter in network.parameters())
        nn.init.zeros_(network[0].weight)
        assert stages.first.network[0].weight.any()
        with pytest.raises(
            ValueError, match="no earlier stage 's3'; there are 's16', 's8', and 'previous' and 'first'"
        ):
            stage_network("s3")
    with pytest.raises(ValueError, match=r"work where a pipeline builds a stage\. Pass a network"):
        stage_network()


# Bad input


def no_export(earlier):
    class Plain(L.LightningModule):
        pass

    return experiment(Plain())


REFUSED = {
    "no stages": (lambda folder: Pipeline([]), ValueError, "`stages` is empty"),
    "same names": (lambda folder: Pipeline([teacher(), teacher()]), ValueError, "would share the folder 'teacher'"),
    "same folders": (lambda folder: Pipeline([student("A"), student("a")]), ValueError, "'A' and 'a' would share"),
    "first stage without a teacher": (lambda folder: Pipeline([student("a")]).run(folder), ValueError, "no earlier stage"),
    "no experiment": (lambda folder: Pipeline([Stage("a", lambda earlier: 3)]).run(folder), TypeError, "must build an `Experiment.*got int"),
    "no export": (lambda folder: Pipeline([Stage("a", no_export)]).run(folder), TypeError, "must have `export"),
    "no function": (lambda folder: Stage("a", 3), TypeError, "must be a function of the earlier stages.*got int"),
    "mode": (lambda folder: Stage("a", len, mode="most"), ValueError, "must be 'max' or 'min', got 'most'"),
    "monitor": (lambda folder: Pipeline([replace(teacher(), monitor="val/f1")]).run(folder), ValueError, "`monitor` is 'val/f1', but the validation logs .*val/accuracy"),
    "owned": (lambda folder: Pipeline([teacher(enable_checkpointing=True)]).run(folder), ValueError, "sets `enable_checkpointing` of the Trainer"),
    "transfer": (lambda folder: ProgressiveStage(net(4), "all"), ValueError, "`transfer` must be 'direct', .*got 'all'"),
    "reuse": (lambda folder: ProgressiveStage(net(4), reuse_alpha=2), ValueError, r"`reuse_alpha` must be in \[0, 1\], got 2"),
    "weights": (lambda folder: ProgressiveStage(net(4), member_weights="size"), ValueError, "`member_weights` must be 'uniform', .*got 'size'"),
    "metric": (lambda folder: ProgressiveStage(net(4), "ensemble", member_weights="performance", metric="val/f1", earlier=earlier(8)), ValueError, "The stage 's8' has no metric 'val/f1'"),
    "residual name": (lambda folder: ProgressiveStage("gpt2", "residual", earlier=earlier(8, 4)), ValueError, "must be a network for `transfer='residual'`"),
    "no layers": (lambda folder: Pipeline([teacher(), Stage("a", lambda earlier: experiment(KD(shortened(9))))]).run(folder), ValueError, "9|list"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_refuses(case, tmp_path):
    build, error, message = case
    with pytest.raises(error, match=message):
        build(tmp_path / "run")


def test_a_broken_manifest_is_named(tmp_path):
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest.json cannot be read"):
        chain().run(tmp_path, console=QUIET)
    (tmp_path / "teacher" / "manifest.json").write_text('{"version": 99}')
    with pytest.raises(ValueError, match=r"has the version 99, expected 1"):
        chain().run(tmp_path, console=QUIET)
