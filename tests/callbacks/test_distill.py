"""The teacher in the loss: against the same by hand, in every way that a fit can go."""

import copy

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lq
from lq.callbacks import Quantize
from lq.callbacks.distill import Distill
from processes import two_ranks
from tiny import NoForward, Tiny, dataset, loader, trainer

X, Y = dataset().tensors


def quantize(**options):
    return Quantize(**({"alpha": None, "stages": False} | options))


def tiny(kind=Tiny, **options):
    seed_everything(0, verbose=False)
    model = kind(batchnorm=False, **options)
    model.net[3].p = 0.0  # by hand there would be another mask
    return model


def kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    p = (teacher / temperature).softmax(-1)
    return temperature**2 * (p * (p.log() - (student / temperature).softmax(-1).log())).sum(-1).mean()


class Manual(Tiny):
    """Two backward calls; the second is of another part of the loss."""

    def __init__(self, **options):
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]) / 2)
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]) / 2)
        optimizer.step()


class Gradients(Callback):
    """Gradients of each step, and those of the same loss by hand, which the step's weights and quantizers give."""

    def __init__(self, model, loss, batches=1):
        self.teacher, self.loss, self.batches = copy.deepcopy(model).eval(), loss, batches
        self.seen, self.expected = [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        size = 4 * self.batches
        at = slice(trainer.global_step * size, (trainer.global_step + 1) * size)
        loss = self.loss(pl_module, self.teacher, X[at], Y[at])
        self.seen.append([p.grad.clone() for p in pl_module.parameters() if p.requires_grad])
        self.expected.append(torch.autograd.grad(loss, [p for p in pl_module.parameters() if p.requires_grad]))


def user_and_kl(weight, temperature):
    def loss(student, teacher, x, y):
        return F.cross_entropy(student.net(x), y) + weight * kl(student.net(x), teacher.net(x).detach(), temperature)

    return loss


@pytest.mark.parametrize(("kind", "accumulate"), [(Tiny, 1), (Tiny, 4), (Manual, 1)])
def test_the_gradient_is_that_of_the_loss_and_the_divergence(tmp_path, kind, accumulate):
    model = tiny(kind)
    gradients = Gradients(model, user_and_kl(0.7, 3.0), accumulate)
    callbacks = [Distill(0.7, 3.0), quantize(), gradients]
    trainer(tmp_path, *callbacks, max_epochs=1, accumulate_grad_batches=accumulate).fit(model, loader())
    assert len(gradients.seen) == 8 // accumulate
    torch.testing.assert_close(gradients.seen, [list(g) for g in gradients.expected])


def test_the_scale_of_a_grad_scaler_is_on_all_of_the_loss(tmp_path):
    model = tiny()
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=256.0))
    gradients = Gradients(model, user_and_kl(5.0, 2.0))
    trainer(tmp_path, Distill(5.0, 2.0), gradients, plugins=[precision], max_epochs=1).fit(model, loader())
    torch.testing.assert_close(gradients.seen, [list(g) for g in gradients.expected], rtol=0.02, atol=0.01)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "64-true"])
def test_the_teacher_computes_in_the_precision_of_the_student(tmp_path, precision):
    dtypes = []

    class Watched(Tiny):
        def forward(self, x):
            dtypes.append(super().forward(x).dtype)
            return super().forward(x)

    trainer(tmp_path, Distill(), precision=precision, max_epochs=1, limit_train_batches=1).fit(tiny(Watched), loader())
    assert dtypes == 2 * [torch.float64 if precision == "64-true" else torch.bfloat16]


class Pictures(Tiny):
    def forward(self, x):
        return super().forward(x.flatten(1))


def test_the_teacher_looks_at_both_sides(tmp_path):
    def loss(student, teacher, x, y):
        images = x.view(-1, 1, 2, 3)
        logits = (teacher(images) + teacher(images[..., [2, 1, 0]])).detach() / 2
        return F.cross_entropy(student(images), y) + kl(student(images), logits, 4.0)

    model = tiny(Pictures)
    gradients = Gradients(model, loss)
    images = DataLoader(TensorDataset(X.view(-1, 1, 2, 3), Y), 4)
    trainer(tmp_path, Distill(mirror=True), quantize(), gradients, max_epochs=1).fit(model, images)
    torch.testing.assert_close(gradients.seen, [list(g) for g in gradients.expected])
    with pytest.raises(MisconfigurationException, match=r"`mirror` is True, and there are no images .*: \[\(4, 6\)\]"):
        trainer(tmp_path, Distill(mirror=True), quantize()).fit(tiny(), loader())


@pytest.mark.parametrize("layers", [None, ["net.4"]])
def test_the_teacher_alone_may_have_another_precision(tmp_path, layers):
    dtypes = []

    class Watched(Tiny):
        def forward(self, x):
            output = super().forward(x)
            dtypes.append(output.dtype)
            return output

    look = Gradients(tiny(), user_and_kl(1.0, 4.0))
    distill = Distill(layers=layers, precision="bf16-mixed")
    trainer(tmp_path, distill, look, max_epochs=1, limit_train_batches=1).fit(tiny(Watched), loader())
    # with layers, the student is once asked what it gives in float
    assert set(dtypes[:-1]) == {torch.bfloat16}
    assert dtypes[-1] == torch.float32
    assert {grad.dtype for grad in look.seen[0]} == {torch.float32}
    if layers is None:
        torch.testing.assert_close(look.seen, [list(g) for g in look.expected], rtol=0.05, atol=0.005)


@pytest.mark.parametrize("layers", [["net.0", "net.4"], ["net.[04]"]])
def test_layers_are_compared_by_relative_squared_error(tmp_path, layers):
    def loss(student, teacher, x, y):
        total = F.cross_entropy(student.net(x), y)
        for last in (1, 5):
            own, target = student.net[:last](x), teacher.net[:last](x).detach()
            total = total + 0.5 * ((own - target) ** 2).mean() / (target**2).mean() / 2
        return total

    model = tiny()
    model.net[2] = nn.ReLU(inplace=True)
    gradients = Gradients(model, loss)
    trainer(tmp_path, Distill(0.5, layers=layers), quantize(), gradients, max_epochs=1).fit(model, loader())
    torch.testing.assert_close(gradients.seen, [list(g) for g in gradients.expected])


def test_a_module_without_forward_runs_its_step_in_the_teacher_too(tmp_path):
    class Noisy(NoForward):
        """Draws a number in its step; logs, and asks the trainer something."""

        def training_step(self, batch, batch_idx):
            assert self.trainer.world_size == 1
            self.noise = torch.rand(())
            loss = F.mse_loss(self.decoder(self.encoder(batch[0] + self.noise)), batch[0])
            self.log("train_loss", loss)
            return loss

    def loss(student, teacher, x, y):
        noisy = x + student.noise
        own, target = (m.decoder(m.encoder(noisy)) for m in (student, teacher))
        return F.mse_loss(own, x) + 3 * F.mse_loss(own, target.detach()) / target.detach().square().mean()

    seed_everything(0, verbose=False)
    model = Noisy()
    gradients = Gradients(model, loss)
    fit = trainer(tmp_path, Distill(3.0, layers=["decoder"]), quantize(), gradients, max_epochs=1)
    fit.fit(model, loader())
    torch.testing.assert_close(gradients.seen, [list(g) for g in gradients.expected])
    # what is logged is the student's
    assert fit.callback_metrics["train_loss"] != 0


def test_calls_are_averaged_and_those_without_gradients_left_out(tmp_path):
    class Twice(Tiny):
        def training_step(self, batch, batch_idx):
            with torch.no_grad():
                self(batch[0] * 7)
            return F.cross_entropy(self(batch[0]) + 0 * self(-batch[0]), batch[1])

    def loss(student, teacher, x, y):
        both = [kl(student.net(x * sign), teacher.net(x * sign).detach(), 4.0) for sign in (1, -1)]
        return F.cross_entropy(student.net(x), y) + sum(both) / 2

    model = tiny(Twice)
    gradients = Gradients(model, loss)
    trainer(tmp_path, Distill(), quantize(), gradients, max_epochs=1).fit(model, loader())
    torch.testing.assert_close(gradients.seen, [list(g) for g in gradients.expected])


def test_what_forward_does_to_its_input_or_draws_is_not_done_twice(tmp_path):
    class Odd(Tiny):
        def forward(self, x):
            x.mul_(2)
            self.noise = torch.rand(())
            return {"logits": self.net(x + self.noise)}

        def training_step(self, batch, batch_idx):
            self.trained_on.append(batch[0].clone())
            return F.cross_entropy(self(batch[0].clone())["logits"], batch[1])

        validation_step = None

    def loss(student, teacher, x, y):
        x = 2 * x + student.noise
        return F.cross_entropy(student.net(x), y) + kl(student.net(x), teacher.net(x).detach(), 4.0)

    model = tiny(Odd)
    gradients = Gradients(model, loss)
    trainer(tmp_path, Distill(), gradients, max_epochs=1).fit(model, loader())
    torch.testing.assert_close(gradients.seen, [list(g) for g in gradients.expected])


def test_the_teacher_is_the_float_model_whatever_the_student_becomes(tmp_path):
    model = Tiny()
    before = copy.deepcopy(model).eval()
    distill = Distill()
    trainer(tmp_path, distill, Quantize(stages=False)).fit(model, loader())
    assert torch.equal(distill.teacher(X), before(X))
    assert not torch.allclose(model.eval()(X), before(X))
    assert not any(p.requires_grad for p in distill.teacher.parameters())
    # and has no part in the student
    assert all(m is not distill.teacher for m in model.modules())
    first = distill.teacher
    trainer(tmp_path, distill, Quantize(stages=False), max_epochs=1).fit(model, loader())
    assert distill.teacher is first


def test_the_teacher_takes_no_dropout_and_leaves_batchnorm_and_random_numbers(tmp_path):
    def fit(*callbacks):
        seed_everything(1, verbose=False)
        model = Tiny()
        trainer(tmp_path, *callbacks, quantize(), max_epochs=1).fit(model, loader(shuffle=True))
        return model

    plain, distilled = fit(), fit(distill := Distill(1e-30))
    torch.testing.assert_close(plain.state_dict(), distilled.state_dict(), rtol=0, atol=0)
    assert distill.teacher.net[1].num_batches_tracked == 0


def test_the_checkpoint_has_nothing_of_the_teacher(tmp_path):
    found = []
    for callbacks in ([], [Distill()]):
        fit = trainer(tmp_path, *callbacks, quantize(), max_epochs=1)
        fit.fit(tiny(), loader())
        fit.save_checkpoint(tmp_path / "a.ckpt")
        found.append(torch.load(tmp_path / "a.ckpt", weights_only=True))
    plain, distilled = found
    assert plain["state_dict"].keys() == distilled["state_dict"].keys()
    assert plain.keys() == distilled.keys()
    assert distilled["callbacks"].keys() - plain["callbacks"].keys() == {"Distill"}
    assert len(distilled["callbacks"]["Distill"]["fingerprint"]) == 64
    # test needs no teacher, nor the float weights
    trainer(tmp_path, Distill(), quantize()).test(Tiny(batchnorm=False), loader(), ckpt_path=tmp_path / "a.ckpt", verbose=False)


class Look(Callback):
    """Whether the teacher's first layer is the student's, by step; unfreezes it at the start of an epoch."""

    def __init__(self, distill, unfreeze):
        self.distill, self.unfreeze, self.shared = distill, unfreeze, []

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.unfreeze:
            pl_module.net[0].requires_grad_(True)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        own, theirs = self.distill.teacher.net, pl_module.net
        self.shared.append(own[0].weight.data_ptr() == theirs[0].weight.data_ptr())
        assert own[4].weight.data_ptr() != theirs[4].weight.data_ptr()


def test_frozen_parameters_are_shared_until_they_are_unfrozen(tmp_path):
    model = tiny()
    model.net[0].requires_grad_(False)
    before = copy.deepcopy(model).eval()
    distill = Distill()
    look = Look(distill, unfreeze=1)
    trainer(tmp_path, distill, quantize(), look, max_epochs=2).fit(model, loader())
    assert look.shared == [True] * 8 + [False] * 8
    assert not torch.equal(model.net[0].weight, before.net[0].weight)
    assert torch.equal(distill.teacher(X), before(X))


def test_frozen_parameters_that_smoothquant_scaled_are_not_shared(tmp_path):
    model = tiny()
    model.net[0].requires_grad_(False)
    before = copy.deepcopy(model).eval()
    distill, rescaling = Distill(), quantize(alpha=0.5)
    look = Look(distill, unfreeze=None)
    trainer(tmp_path, distill, rescaling, look, max_epochs=1).fit(model, loader())
    assert "net.0" in {group.producer for group in rescaling.rescaled}
    assert not any(look.shared)
    assert torch.equal(distill.teacher(X), before(X))


def test_after_the_fit_nothing_is_shared(tmp_path):
    model, distill = tiny(), Distill()
    model.net[0].requires_grad_(False)
    trainer(tmp_path, distill, quantize(), max_epochs=1).fit(model, loader())
    assert distill.teacher.net[0].weight.data_ptr() != model.net[0].weight.data_ptr()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in (model, distill.teacher))


def test_resume_is_bit_identical(tmp_path):
    def fit(folder, ckpt_path=None):
        model = tiny()
        model.net[0].requires_grad_(False)
        keep = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
        callbacks = [Distill(2.0), Quantize(stages=False), keep]
        trainer(folder, *callbacks, max_epochs=4, enable_checkpointing=True).fit(model, loader(), ckpt_path=ckpt_path)
        return model

    whole = fit(tmp_path / "a")
    resumed = fit(tmp_path / "b", tmp_path / "a" / "epoch=1.ckpt")
    torch.testing.assert_close(whole.state_dict(), resumed.state_dict(), rtol=0, atol=0)


def test_resume_with_other_float_weights_is_refused(tmp_path):
    fit = trainer(tmp_path, Distill(), quantize(), max_epochs=1)
    fit.fit(tiny(), loader())
    fit.save_checkpoint(tmp_path / "a.ckpt")
    seed_everything(9, verbose=False)
    with pytest.raises(MisconfigurationException, match=r"another teacher.*float weights before `fit"):
        trainer(tmp_path, Distill(), quantize()).fit(Tiny(batchnorm=False), loader(), ckpt_path=tmp_path / "a.ckpt")


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Tiny, Manual])
def test_on_two_ranks_the_gradient_is_that_of_both_batches(tmp_path, kind):
    model = tiny(kind)
    weight, temperature = 0.7, 3.0
    teacher = copy.deepcopy(model)
    callbacks = [Distill(weight, temperature), Record(tmp_path)]
    trainer(tmp_path, *callbacks, max_epochs=1, **two_ranks()).fit(model, loader())
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    torch.testing.assert_close(one["last"], two["last"], rtol=0, atol=0)
    assert len(one["gradients"]) == 4
    for step, gradients in enumerate(one["gradients"]):
        model.load_state_dict(one["weights"][step])
        x, y = (torch.cat(both) for both in zip(one["batches"][step], two["batches"][step], strict=True))
        loss = user_and_kl(weight, temperature)(model, teacher, x, y)
        torch.testing.assert_close(gradients, list(torch.autograd.grad(loss, list(model.parameters()))))


class Record(Callback):
    """Saves each step's batch, gradients and weights, and the last weights."""

    def __init__(self, folder):
        self.folder, self.seen = folder, {"batches": [], "gradients": [], "weights": []}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen["batches"].append(list(batch))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen["gradients"].append([p.grad.clone() for p in pl_module.parameters()])
        self.seen["weights"].append({name: value.clone() for name, value in pl_module.state_dict().items()})

    def on_train_end(self, trainer, pl_module):
        torch.save(self.seen | {"last": pl_module.state_dict()}, self.folder / f"{trainer.global_rank}.pt")


def test_the_loss_is_logged_where_the_trainer_logs(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    trainer(tmp_path, Distill(), quantize(), logger=logger, log_every_n_steps=3, max_epochs=1).fit(Tiny(), loader())
    rows = (tmp_path / "metrics.csv").read_text().split()
    column, step = (rows[0].split(",").index(name) for name in ("distill/loss", "step"))
    logged = {int(row.split(",")[step]): row.split(",")[column] for row in rows[1:] if row.split(",")[column]}
    assert list(logged) == [3, 6]
    assert all(float(value) > 0 for value in logged.values())


def test_the_users_loss_is_logged_as_it_is(tmp_path):
    class Keep(Callback):
        losses = []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.losses.append((outputs["loss"], trainer.callback_metrics["train_loss"]))

    model = tiny()
    trainer(tmp_path, Distill(100.0), quantize(), Keep(), limit_train_batches=2, max_epochs=1).fit(model, loader())
    assert all(a == b for a, b in Keep.losses)


def test_layers_that_smoothquant_scaled_are_told(tmp_path):
    with pytest.warns(UserWarning, match=r"`net\.0` gives something else.*`alpha=None`"):
        trainer(tmp_path, Distill(layers=["net.*"]), quantize(alpha=0.5), max_epochs=1).fit(tiny(), loader())


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": 0}, "`weight` is 0"),
        ({"temperature": float("nan")}, "`temperature` is nan"),
        ({"temperature": -1.0}, r"`temperature` is -1\.0"),
        ({"layers": "net.*"}, r"`layers` is 'net\.\*'"),
        ({"layers": []}, r"`layers` is \[\]"),
        ({"mirror": True, "layers": ["net.4"]}, "`mirror` is True, and `layers` is given"),
        ({"precision": "bf16-true"}, "`precision` is 'bf16-true': choose one of bf16-mixed, 16-mixed"),
    ],
)
def test_bad_arguments_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        Distill(**options)


class ManualNoForward(NoForward):
    automatic_optimization = False


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (NoForward, {}, r"NoForward has no `forward`.*give `layers`"),
        (ManualNoForward, {"layers": ["encoder"]}, "need automatic optimization"),
        (Tiny, {"layers": ["nett.*"]}, r"'nett\.\*' in `layers` matches no module: the closest are"),
    ],
)
def test_a_fit_that_cannot_work_is_refused_before_it_starts(tmp_path, module, options, message):
    with pytest.raises(MisconfigurationException, match=message):
        trainer(tmp_path, Distill(**options)).fit(module(), loader())


def test_a_quantized_module_has_no_float_model_to_learn_from(tmp_path):
    model = tiny()
    trainer(tmp_path, quantize(), max_epochs=1).fit(model, loader())
    with pytest.raises(MisconfigurationException, match="put Distill before Quantize"):
        trainer(tmp_path, Distill()).fit(model, loader())


LEARNED = [lq.QuantRule("*", lq.QuantDescriptor(4, learn_amax="lsq"), None)]


@pytest.mark.parametrize(
    "options",
    [{}, {"rules": LEARNED}, {"corrections": [lq.corrections.weights_bias_correction_]}, {"target": "tensorrt", "alpha": 0.5}],
)
def test_after_a_validation_the_teacher_is_the_float_model_still(tmp_path, options):
    fingerprints, fitted = [], []
    for first in (False, True):
        model, distill = tiny(), Distill()
        model.net[0].bias = None
        float_model = copy.deepcopy(model).eval()
        run = trainer(tmp_path, distill, quantize(**options), max_epochs=1)
        if first:
            run.validate(model, loader(), verbose=False)
        run.fit(model, loader())
        assert torch.equal(distill.teacher(X), float_model(X))
        assert not list(lq.named_quantizers(distill.teacher))
        fingerprints.append(distill.state_dict()["fingerprint"])
        fitted.append(model.state_dict())
    assert len(set(fingerprints)) == 1
    torch.testing.assert_close(*fitted, rtol=0, atol=0)


def test_ranks_with_other_weights_are_refused(tmp_path, monkeypatch):
    fit = trainer(tmp_path, Distill())
    monkeypatch.setattr(fit.strategy, "broadcast", lambda value, src=0: "that of rank 0" if isinstance(value, str) else value)
    with pytest.raises(MisconfigurationException, match="load them on every rank"):
        fit.fit(Tiny(), loader())


class Outputs(Tiny):
    """Whatever ``output`` makes of the logits."""

    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, x):
        return self.output(self.net(x))

    def training_step(self, batch, batch_idx):
        self(batch[0])
        return self.net(batch[0]).sum()


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (lambda logits: (logits, logits), "`forward` gave a tuple"),
        (lambda logits: {"scores": logits}, "`forward` gave a dict"),
        (lambda logits: logits[:, 0], r"`forward` gave the shape \(4,\)"),
        (lambda logits: logits[:, :1], r"`forward` gave the shape \(4, 1\)"),
    ],
)
def test_an_output_that_has_no_logits_is_refused(tmp_path, output, message):
    with pytest.raises(MisconfigurationException, match=message):
        trainer(tmp_path, Distill()).fit(Outputs(output), loader())


class Unseen(Tiny):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.forward(batch[0]), batch[1])


class Uneven(Tiny):
    def forward(self, x):
        return self.net(self.net[1](self.net[0](x)) @ torch.ones(8, 6) if self.training else x)


class Root(Manual):
    def training_step(self, batch, batch_idx):
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]).sqrt())


@pytest.mark.parametrize(
    ("module", "layers", "message"),
    [
        (Unseen, None, r"Unseen ran nothing to compare.*`self\.forward\(\.\.\.\)` is not seen"),
        (Uneven, ["net.0"], r"`net\.0` ran 2 times, and 1 times in the teacher"),
        (Root, None, r"`1 \* loss`"),
    ],
)
def test_a_step_that_cannot_be_distilled_is_refused(tmp_path, module, layers, message):
    model = module()
    with pytest.raises(MisconfigurationException, match=message):
        trainer(tmp_path, Distill(layers=layers)).fit(model, loader())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
