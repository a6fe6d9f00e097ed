"""Pools in front of batches and in trainings: who is run on what, what is mixed, remembered and learned."""

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_distill import KD, CausalLM
from lightning_distill.callbacks import AdaptToCapability, PoolLog
from lightning_distill.datamodules import TensorDataModule
from lightning_distill.selection import OnlyClasses
from lightning_distill.tasks import Classification
from lightning_distill.teachers import (
    AverageChoice,
    CachedChoice,
    CascadeChoice,
    CostAwareChoice,
    DifficultyChoice,
    EMATeacher,
    PoolMember,
    RouterLoss,
    ScoredChoice,
    TeacherPool,
    TeacherRouter,
)
from lightning_distill.teachers.pools import decisions, load_balance, take_rows

TASK = Classification()


class Counting(nn.Module):
    """A network that remembers how many samples it saw."""

    def __init__(self, network):
        super().__init__()
        self.network = network
        self.seen = 0

    def forward(self, x):
        self.seen += len(x)
        return self.network(x)


def members(count=3, classes=3, scale=1.0):
    made = []
    for place in range(count):
        torch.manual_seed(place)
        network = nn.Linear(4, classes)
        with torch.no_grad():
            network.weight.mul_(scale)
        made.append(
            PoolMember(
                f"t{place}", Counting(network), cost=place + 1.0, accuracy=0.7 + place / 20, tags=[f"g{place % 2}"]
            )
        )
    return made


def batch(size=6):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(size, 4, generator=generator)
    return x, torch.randint(3, (size,), generator=generator), torch.arange(size)


def seen(pool):
    return [member.teacher.network.seen for member in pool.members]


def probs(pool, x):
    return torch.stack([member.teacher.network.network(x).softmax(-1) for member in pool.members])


@pytest.mark.chapter("C30", api="lightning_distill.teachers.TeacherPool")
def test_members_are_frozen_tagged_and_no_part_of_the_module(make_trainer):
    pool = TeacherPool(members())
    assert list(pool.parameters()) == []
    before = [member.teacher.network.network.weight.clone() for member in pool.members]
    module = KD(nn.Linear(4, 3), pool, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    make_trainer(max_epochs=1).fit(module, datamodule=data())
    assert set(module.state_dict()) == {"student.weight", "student.bias"}
    for member, weight in zip(pool.members, before, strict=True):
        assert torch.equal(member.teacher.network.network.weight, weight)
        assert not member.teacher.network.training
    assert pool.filter(["g0"]).names == ("t0", "t2")
    with pytest.raises(
        ValueError, match=r"No member of the pool has all of the tags \['g7'\]; there are \['g0', 'g1'\]"
    ):
        pool.filter(["g7"])


def data(rows=60):
    generator = torch.Generator().manual_seed(5)
    x, y = torch.randn(rows, 4, generator=generator), torch.randint(3, (rows,), generator=generator)
    return TensorDataModule((x, y), (x[:20], y[:20]), batch_size=10)


def test_the_average_of_all():
    pool, (x, y, i) = TeacherPool(members()), batch()
    said = pool((x, y, i), TASK)
    torch.testing.assert_close(said.logits.exp(), probs(pool, x).mean(0))
    assert not said.logits.requires_grad


@pytest.mark.parametrize("mode", ["hard", "soft"])
def test_scored_choices_mix_by_their_scores(mode):
    pool, (x, y, i) = TeacherPool(members(), ScoredChoice(mode, tau=0.3)), batch()
    said = pool((x, y, i), TASK)
    p = probs(pool, x)
    scores = p.amax(-1) + (p.argmax(-1) == y).double() - 0.1 * torch.special.entr(p).sum(-1)
    if mode == "hard":
        expected = torch.stack([p[scores[:, row].argmax(), row] for row in range(6)])
    else:
        expected = torch.einsum("tb,tbc->bc", (scores / 0.3).softmax(0).float(), p)
    torch.testing.assert_close(said.logits.softmax(-1), expected)


@pytest.mark.chapter("C31", api="lightning_distill.teachers.DifficultyChoice")
def test_each_teacher_is_run_on_its_samples_only():
    pool, (x, y, i) = TeacherPool(members(scale=4.0), DifficultyChoice((0.2, 0.5))), batch(40)
    pool((x[:1], y[:1], i[:1]), TASK)  # looks at the classes
    start = seen(pool)
    said = pool((x, y, i), TASK)
    difficulty = 1 - probs(pool, x)[0].amax(-1)
    place = torch.bucketize(difficulty, torch.tensor([0.2, 0.5]))
    runs = [after - before for before, after in zip(start, seen(pool), strict=True)]
    assert runs == [40, int((place == 1).sum()), int((place == 2).sum())]
    assert 0 < runs[1] < 40
    for row, chosen in enumerate(place.tolist()):
        expected = pool.members[chosen].teacher.network.network(x[row])
        torch.testing.assert_close(said.logits[row], expected)


@pytest.mark.chapter("C37", api="lightning_distill.teachers.CascadeChoice")
def test_a_cascade_stops_at_the_first_sure_teacher():
    pool, (x, y, i) = TeacherPool(members(scale=4.0), CascadeChoice(0.8)), batch(40)
    pool((x[:1], y[:1], i[:1]), TASK)
    start = seen(pool)
    said = pool({"input": x, "label": y}, Classification())
    sure = probs(pool, x).amax(-1)
    runs = [after - before for before, after in zip(start, seen(pool), strict=True)]
    assert runs == [40, int((sure[0] < 0.8).sum()), int(((sure[0] < 0.8) & (sure[1] < 0.8)).sum())]
    chosen = torch.where((sure >= 0.8).any(0), (sure >= 0.8).double().argmax(0), sure.argmax(0))
    for row, teacher in enumerate(chosen.tolist()):
        torch.testing.assert_close(said.logits[row], pool.members[teacher].teacher.network.network(x[row]))


@pytest.mark.chapter("X5", api="lightning_distill.teachers.CostAwareChoice")
def test_cost_aware_choices_run_one_teacher_per_sample():
    pool = TeacherPool(members(), CostAwareChoice("sampled", tau=0.5)).train()
    pool(batch(1), TASK)
    start = seen(pool)
    for _ in range(20):
        pool(batch(50), TASK)
    runs = [after - before for before, after in zip(start, seen(pool), strict=True)]
    assert sum(runs) == 1000
    scores = torch.tensor([0.7 - 0.5 / 3, 0.75 - 1 / 3, 0.8 - 0.5])
    torch.testing.assert_close(torch.tensor(runs) / 1000, (scores / 0.5).softmax(0), rtol=0, atol=0.06)
    pool.eval()
    start = seen(pool)
    pool(batch(50), TASK)
    assert [after - before for before, after in zip(start, seen(pool), strict=True)] == [50, 0, 0]


@pytest.mark.chapter("C37", api="lightning_distill.teachers.CachedChoice")
def test_decisions_are_remembered_by_sample_and_survive_a_checkpoint():
    def make():
        return TeacherPool(members(scale=4.0), CachedChoice(ScoredChoice("hard"))).train()

    pool, said = make(), None
    said = pool(batch(20), TASK)
    start = seen(pool)
    again = pool(batch(20), TASK)
    torch.testing.assert_close(again.logits, said.logits)
    runs = [after - before for before, after in zip(start, seen(pool), strict=True)]
    assert sum(runs) == 20  # one teacher for each
    assert pool.choice.remembered == 20
    other = make()
    other.load_state_dict(pool.state_dict())
    assert other.choice.remembered == 20
    torch.testing.assert_close(other(batch(20), TASK).logits, said.logits)
    x, y, _ = batch(4)
    with pytest.raises(ValueError, match="The batch has no `index`, by which decisions are remembered"):
        pool((x, y), TASK)


def test_decisions_among_other_teachers_are_refused():
    pool = TeacherPool(members(), CachedChoice(ScoredChoice("hard"))).train()
    pool(batch(5), TASK)
    state = pool.state_dict()
    for others in (members(2), members()[::-1]):
        other = TeacherPool(others, CachedChoice(ScoredChoice("hard")))
        with pytest.raises(ValueError, match=r"decisions among the teachers \['t0', 't1', 't2'\], but the pool has"):
            other.load_state_dict(state)
    x, y, i = batch(5)
    with pytest.raises(ValueError, match="`index` must not be negative, got -1"):
        pool((x, y, i - 1), TASK)


def test_old_decisions_are_made_anew():
    pool = TeacherPool(members(), CachedChoice(AverageChoice(), max_uses=2)).train()
    calls = []
    pool.choice.choice.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(5):
        pool(batch(3), TASK)
    assert len(calls) == 3


def test_processes_tell_each_other_what_they_decided(monkeypatch):
    told = []

    def gather(rows):  # the other process had the samples 7 (twice in this batch of all) and 2
        told.append(rows)
        others = torch.tensor([[7, 1, 0, 0, 1], [2, 4, 0, 1, 0]], dtype=torch.float64)
        return torch.cat([others[:1] * torch.tensor([1, 3, 1, 1, 1]), rows, others]), 1

    monkeypatch.setattr(decisions, "world_size", lambda: 2)
    monkeypatch.setattr(decisions, "gather_rows", gather)
    choice = CachedChoice(ScoredChoice("hard"))
    pool = TeacherPool(members(scale=4.0), choice).train()
    said = pool(batch(2), TASK)
    pool(batch(2), TASK)
    mine = choice.get_extra_state()["shares"][:2]
    pool.share()
    assert told[0].tolist() == [[i, 3.0, *mine[i].tolist()] for i in range(2)]
    state = choice.get_extra_state()
    assert state["uses"].tolist() == [3, 3, 4, 0, 0, 0, 0, 1]
    torch.testing.assert_close(state["shares"][:2], mine)
    assert state["shares"][[2, 7]].tolist() == [[0, 1, 0], [0, 0, 1]]
    torch.testing.assert_close(pool(batch(2), TASK).logits, said.logits)
    x, y, _ = batch(1)
    before = seen(pool)
    pool((x, y, torch.tensor([7])), TASK)
    assert [now - then for then, now in zip(before, seen(pool), strict=True)] == [0, 0, 1]
    outer = TeacherPool([PoolMember("inner", pool), *members(3)[2:]])
    outer.share()
    assert told[1].shape == (3, 5)  # 0, 1 and 7
    outer.share()
    assert told[2].shape == (0, 5)
    monkeypatch.setattr(decisions, "gather_rows", lambda rows: (rows, 0))
    outer.share()  # nothing was decided anywhere
    assert choice.get_extra_state()["uses"].tolist()[3:7] == [0] * 4
    assert {rows.dtype for rows in told} == {torch.float64}  # float32 has no integers above 2 ** 24


def test_processes_talk_after_each_training_batch(make_trainer, monkeypatch):
    told = []
    monkeypatch.setattr(decisions, "world_size", lambda: 2)
    monkeypatch.setattr(decisions, "gather_rows", lambda rows: told.append(len(rows)) or (rows, 0))
    module = KD(nn.Linear(4, 3), TeacherPool(members(), CachedChoice(ScoredChoice("hard"))))
    make_trainer(max_epochs=2, limit_train_batches=3).fit(module, datamodule=data())
    assert told == [10] * 6


def test_a_pool_may_be_a_member():
    inner = TeacherPool(members(2), ScoredChoice("hard", beta=0.0))
    pool, (x, y, i) = TeacherPool([PoolMember("inner", inner), *members(3)[2:]]), batch()
    said = pool((x, y, i), TASK)
    expected = (
        inner((x, y, i), TASK).logits.softmax(-1) + pool.members[1].teacher((x, y, i), TASK).logits.softmax(-1)
    ) / 2
    torch.testing.assert_close(said.logits.exp(), expected)


def specialists():
    """Two teachers that know two classes each, and say nonsense about the others with confidence."""
    torch.manual_seed(1)
    first, second = nn.Linear(2, 4), nn.Linear(2, 4)
    with torch.no_grad():
        for network, known in ((first, (0, 1)), (second, (2, 3))):
            network.weight.zero_()
            network.bias.fill_(-9.0)
            for sign, label in zip((1, -1), known, strict=True):
                network.weight[label] = torch.tensor([0.0, 3.0 * sign])
                network.bias[label] = 0.0
    return [PoolMember("low", first), PoolMember("high", second)]


def world(rows=400):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(rows, 2, generator=generator)
    x = x + torch.sign(x) * 0.3
    y = torch.where(x[:, 0] < 0, 0, 2) + (x[:, 1] < 0).long()
    return TensorDataModule((x, y), (x[:100], y[:100]), batch_size=50)


@pytest.mark.chapter("C35", api="lightning_distill.teachers.TeacherRouter")
def test_a_router_learns_which_teacher_knows_what(make_trainer, tmp_path):
    def make():
        torch.manual_seed(0)
        pool = TeacherPool(specialists(), TeacherRouter(nn.Linear(2, 2)))
        return KD(
            nn.Linear(2, 4), pool, terms={"router": RouterLoss()}, optimizer=lambda p: torch.optim.Adam(p, lr=0.05)
        )

    module = make()
    trainer = make_trainer(max_epochs=8)
    trainer.fit(module, datamodule=world())
    x, y = world().splits.train
    shares = module.teacher.choice.network(x).softmax(-1)
    right = (shares.argmax(-1) == (y >= 2)).double().mean()
    assert right > 0.95
    said = module.teacher((x, y), TASK)
    assert (said.logits.argmax(-1) == y).double().mean() > 0.95
    path = tmp_path / "router.ckpt"
    trainer.save_checkpoint(path)
    state = torch.load(path, weights_only=True)["state_dict"]
    assert {"teacher.choice.network.weight", "teacher.choice.network.bias"} < set(state)
    assert not any("teachers" in name for name in state)
    again = make()
    again.load_state_dict(state)
    assert torch.equal(again.teacher.choice.network.weight, module.teacher.choice.network.weight)
    assert set(dict(module.export().named_parameters())) == {"weight", "bias"}


def test_the_student_gives_the_router_no_gradient_and_the_router_none_to_the_student():
    pool = TeacherPool(specialists(), TeacherRouter(nn.Linear(2, 2), noise=0.1))
    module = KD(nn.Linear(2, 4), pool, terms={"router": RouterLoss(0.5)})
    x, y = world().splits.train
    step = module.observe((x[:30], y[:30]))
    losses = module.losses(step)
    student, router = list(module.student.parameters()), list(pool.choice.network.parameters())
    for name, parameters in (("soft", router), ("hard", router), ("router", student)):
        found = torch.autograd.grad(losses[name], parameters, allow_unused=True, retain_graph=True)
        assert found == (None,) * len(parameters), name
    assert not step.teacher.logits.requires_grad
    assert all(g is not None for g in torch.autograd.grad(losses["router"], router))
    unbalanced = RouterLoss(0.0)(step).mean()
    expected = unbalanced + 0.5 * load_balance(step.teacher.weights)
    torch.testing.assert_close(losses["router"], expected)


def test_a_router_that_nothing_trains_is_refused(make_trainer):
    module = KD(nn.Linear(2, 4), TeacherPool(specialists(), TeacherRouter(nn.Linear(2, 2))))
    with pytest.raises(ValueError, match=r"trained by no loss term.*RouterLoss\(\)"):
        make_trainer(max_epochs=1).fit(module, datamodule=world())
    module = KD(nn.Linear(2, 4), TeacherPool(specialists()), terms={"router": RouterLoss()})
    with pytest.raises(ValueError, match="trains the router of a `TeacherPool"):
        make_trainer(max_epochs=1).fit(module, datamodule=world())


def test_the_log_tells_who_was_run_and_what_it_cost(make_trainer):
    pool = TeacherPool(members(scale=4.0), DifficultyChoice((0.2, 0.5)))
    trainer = make_trainer(max_epochs=1, callbacks=[PoolLog()], log_every_n_steps=6)
    module = KD(nn.Linear(4, 3), pool)
    trainer.fit(module, datamodule=data())
    logged = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("pool/")}
    assert logged["pool/runs/t0"] == 1
    assert sum(logged[f"pool/share/t{place}"] for place in range(3)) == pytest.approx(1)
    cost = sum((place + 1) * logged[f"pool/runs/t{place}"] for place in range(3))
    assert logged["pool/cost"] == pytest.approx(cost)
    assert 1 < cost < 6
    with pytest.raises(TypeError, match="needs a `TeacherPool` as the module's teacher"):
        make_trainer(max_epochs=1, callbacks=[PoolLog()]).fit(KD(nn.Linear(4, 3), nn.Linear(4, 3)), datamodule=data())


@pytest.mark.chapter("C39", api="lightning_distill.callbacks.AdaptToCapability")
def test_the_threshold_rises_with_the_student(make_trainer):
    choice = DifficultyChoice((0.2, 0.5))
    adapt = AdaptToCapability(alpha=0.5)
    module = KD(
        nn.Linear(4, 3), TeacherPool(members(), choice), alpha=0.9, optimizer=lambda p: torch.optim.Adam(p, lr=0.1)
    )
    seen_values = []

    class Watch(AdaptToCapability):
        def on_validation_end(self, trainer, pl_module):
            super().on_validation_end(trainer, pl_module)
            if not trainer.sanity_checking:
                seen_values.append((float(trainer.callback_metrics["val/accuracy"]), choice.thresholds[-1]))

    watch = Watch(alpha=0.5)
    make_trainer(max_epochs=8, check_val_every_n_epoch=2, callbacks=[watch]).fit(module, datamodule=data())
    capability, last = seen_values[0][0], seen_values[0][0]
    rate = 0.0
    for value, threshold in seen_values[1:]:
        capability += 2 * ((value - last) / 2 + rate) / 2  # two epochs between two validations
        rate, last = (value - last) / 2, value
        assert threshold == pytest.approx(0.5 * (1 + 0.5 * capability), rel=1e-6)
    adapt.load_state_dict(watch.state_dict())
    assert adapt.capability.value == pytest.approx(capability)
    assert adapt.theta0 == 0.5
    average = KD(nn.Linear(4, 3), TeacherPool(members()))
    with pytest.raises(ValueError, match="moves the last threshold of a `DifficultyChoice`"):
        make_trainer(max_epochs=1, callbacks=[AdaptToCapability()]).fit(average, datamodule=data())


class NoLength(IterableDataset):
    def __init__(self, dataset):
        self.dataset = dataset

    def __iter__(self):
        return iter(self.dataset)


@pytest.mark.filterwarnings("ignore:.*has `len\\(dataloader\\)`:UserWarning")
@pytest.mark.parametrize(
    ("trainer", "times"),
    [
        ({}, [1, 2, 3]),
        ({"accumulate_grad_batches": 3}, [1, 2, 3]),
        ({"accumulate_grad_batches": 9}, [1, 2, 3]),
        ({"val_check_interval": 2}, [0.4, 0.8, 1.4, 1.8, 2.4, 2.8]),
        ("no length", [0, 1, 2]),
    ],
)
def test_capability_counts_its_time_in_epochs(make_trainer, trainer, times):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(40, 4, generator=generator)
    training = TensorDataset(x, x[:, :3].argmax(dim=1))
    seen_times, capabilities = [], set()

    class Watch(AdaptToCapability):
        def on_validation_end(self, trainer, pl_module):
            super().on_validation_end(trainer, pl_module)
            if not trainer.sanity_checking:
                seen_times.append(self.state_dict()["last"][0])
                capabilities.add(self.capability.value)

    watch = Watch(alpha=0.5)
    pool = TeacherPool(members(), DifficultyChoice((0.2, 0.5)))
    module = KD(nn.Linear(4, 3), pool, alpha=0.9, optimizer=lambda p: torch.optim.Adam(p, lr=0.1))
    arguments = {} if trainer == "no length" else trainer
    loader = DataLoader(NoLength(training) if trainer == "no length" else training, 8)
    make_trainer(max_epochs=3, callbacks=[watch], **arguments).fit(module, loader, DataLoader(training, 40))
    assert seen_times == pytest.approx(times)
    assert pool.choice.thresholds[-1] > 0.5
    assert len(capabilities) > 1


def test_thresholds_are_the_same_in_all_processes(make_trainer, monkeypatch):
    """A metric that is not the same everywhere is taken from the first process."""
    first = iter([0.25, 0.5])
    monkeypatch.setattr(
        SingleDeviceStrategy, "broadcast", lambda self, value, src=0: next(first) if type(value) is float else value
    )
    pool = TeacherPool(members(), DifficultyChoice((0.2, 0.5)))
    make_trainer(max_epochs=2, callbacks=[AdaptToCapability(alpha=0.5)]).fit(
        KD(nn.Linear(4, 3), pool), datamodule=data()
    )
    assert pool.choice.thresholds[-1] == pytest.approx(0.5 * (1 + 0.5 * (0.25 + 0.25 / 2)))


def test_rows_of_nested_batches():
    nested = {
        "x": torch.arange(6).view(3, 2),
        "names": ["a", "b", "c"],
        "more": (torch.arange(3), {"y": torch.ones(3)}),
    }
    found = take_rows(nested, torch.tensor([2, 0]), 3)
    assert found["x"].tolist() == [[4, 5], [0, 1]]
    assert found["names"] == ["c", "a"]
    assert found["more"][0].tolist() == [2, 0]
    assert found["more"][1]["y"].tolist() == [1, 1]


def test_specialists_learn_from_their_classes_alone():
    from lightning_distill.outputs import Outputs, Step

    rule = OnlyClasses([0, 2])
    labels = torch.tensor([0, 1, 2, -100])
    step = Step(None, Outputs(torch.zeros(4, 3)), labels=labels)
    assert rule(step).tolist() == [1, 0, 1, 0]
    module = KD(nn.Linear(4, 3), alpha=1.0, item_weights={"*": rule})
    x, _, _ = batch(4)
    (gradient,) = torch.autograd.grad(module.loss(module.observe((x, labels)))[0], module.student.weight)
    module.item_weights = {}
    keep = torch.tensor([0, 2])
    (expected,) = torch.autograd.grad(module.loss(module.observe((x[keep], labels[keep])))[0], module.student.weight)
    torch.testing.assert_close(gradient, expected * 2 / 4)


ONE = ("a", nn.Linear(4, 3))
REFUSED = {
    "empty": (lambda: TeacherPool([]), ValueError, "`members` is empty"),
    "no member": (lambda: TeacherPool([nn.Linear(4, 3)]), TypeError, "must be `PoolMember`s, got Linear"),
    "twice": (lambda: TeacherPool([PoolMember(*ONE), PoolMember(*ONE)]), ValueError, "Two members of the pool are named 'a'"),
    "cost": (lambda: PoolMember(*ONE, cost=-1.0), ValueError, "`cost` of the teacher 'a' must be finite and not negative"),
    "accuracy": (lambda: PoolMember(*ONE, accuracy=90), ValueError, r"`accuracy` of the teacher 'a' must be in \[0, 1\], got 90"),
    "name": (lambda: PoolMember("", ONE[1]), ValueError, "`name` must be a string that is not empty"),
    "average": (lambda: PoolMember("a", EMATeacher(nn.Linear(4, 3))), TypeError, "'a' is a EMATeacher that learns in training"),
    "inner router": (lambda: PoolMember("a", TeacherPool(members(2), TeacherRouter(nn.Linear(4, 2)))), TypeError, "'a' is a TeacherPool that learns"),
    "teacher": (lambda: PoolMember("a", "gpt2"), TypeError, "must be a network or a `Teacher`, got str"),
    "no accuracy": (lambda: TeacherPool([PoolMember(*ONE)], CostAwareChoice()), ValueError, "The teacher 'a' has no `accuracy`"),
    "thresholds": (lambda: TeacherPool([PoolMember(*ONE)], DifficultyChoice()), ValueError, "one fewer than the 1 teachers of the pool, got 2"),
    "top_k": (lambda: TeacherRouter(nn.Linear(4, 2), top_k=1), ValueError, "`top_k` must be None or at least 2"),
    "too many": (lambda: TeacherPool([PoolMember(*ONE)], TeacherRouter(nn.Linear(4, 2), top_k=2)), ValueError, "`top_k` is 2, but the pool has 1 teachers"),
    "router": (lambda: TeacherPool(members(), TeacherRouter(nn.Linear(4, 2)))(batch(), TASK), ValueError, "Give it one output per teacher"),
    "cached router": (lambda: CachedChoice(TeacherRouter(nn.Linear(4, 2))), ValueError, "is a TeacherRouter, which is trained"),
    "classes": (lambda: TeacherPool([*members(1), *[PoolMember("x", nn.Linear(4, 5))]])(batch(), TASK), ValueError, r"different numbers of classes: \{'t0': 3, 'x': 5\}"),
    "tokens": (lambda: TeacherPool(members())({"input_ids": torch.zeros(2, 3)}, CausalLM()), TypeError, "but CausalLM has none"),
    "mode": (lambda: ScoredChoice("best"), ValueError, "`mode` must be 'hard', 'soft' or 'sampled', got 'best'"),
    "epsilon": (lambda: CostAwareChoice("soft", epsilon=0.1), ValueError, "with `mode='soft'` nothing is drawn"),
    "measure": (lambda: DifficultyChoice(measure="size"), ValueError, "`measure` must be 'scout'"),
    "only": (lambda: OnlyClasses([]), ValueError, "`classes` must be class indices, at least one"),
    "balance": (lambda: RouterLoss(-1.0), ValueError, "`balance` must be finite and not negative"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_refuses(case):
    build, error, message = case
    with pytest.raises(error, match=message):
        build()
