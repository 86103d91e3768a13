"""TimmClassifier: outputs from the data, named refusals, and a step that an own computation repeats."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import timm
import torch
from small_runs import quiet_trainer

from clkit.data import ClassIncremental, StreamDataModule
from clkit.errors import ArgumentError, ConfigurationError, StateError
from clkit.models import IdentityBackbone, TimmClassifier

Trainers = Callable[..., pl.Trainer]


def attached(model: TimmClassifier, **data: object) -> TimmClassifier:
    """The model as it stands in ``setup``, with a data module that has these attributes."""
    model._trainer = SimpleNamespace(datamodule=SimpleNamespace(**data)) if data else SimpleNamespace()
    model.setup("fit")
    return model


# ---- number of outputs


def test_the_number_of_classes_comes_from_the_data() -> None:
    model = attached(TimmClassifier("test_vit"), num_classes=7)
    assert model(torch.zeros(2, 3, 160, 160)).shape == (2, 7)


def test_a_number_that_is_already_right_keeps_the_classifier() -> None:
    model = TimmClassifier("test_vit", num_classes=None, model_kwargs={"num_classes": 7})
    before = model.network.get_classifier()
    assert attached(model, num_classes=7).network.get_classifier() is before


def test_without_a_data_module_the_model_stays_as_it_is() -> None:
    model = attached(TimmClassifier("test_vit"))
    assert model.network.num_classes == timm.create_model("test_vit").num_classes
    assert attached(TimmClassifier("test_vit"), other=1).network.num_classes == model.network.num_classes


@pytest.mark.parametrize(("given", "outputs"), [(0, 64), (7, 7), (9, 9)])
def test_a_given_number_is_kept(given: int, outputs: int) -> None:
    model = attached(TimmClassifier("test_vit", num_classes=given), num_classes=7)
    assert model(torch.zeros(1, 3, 160, 160)).shape == (1, outputs)


def test_a_number_that_is_too_small_for_the_data_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"num_classes=5 of the model is too small .* need 7 outputs"):
        attached(TimmClassifier("test_vit", num_classes=5), num_classes=7)


def test_a_stream_gives_the_number(make_trainer: Trainers) -> None:
    model = TimmClassifier("resnet10t", model_kwargs={"in_chans": 1})
    data = StreamDataModule("digits", ClassIncremental(classes_per_experience=2), stop_after=1, preprocessing="unit")
    make_trainer(limit_train_batches=1, limit_val_batches=0).fit(model, datamodule=data)
    assert model.network.num_classes == 10  # of the whole stream, so that a stopped run can go on


# ---- the identity backbone


def test_the_identity_backbone_passes_features_and_takes_no_classifier_of_unknown_width() -> None:
    model = attached(TimmClassifier("identity"), num_classes=7)
    features = torch.randn(3, 5)
    assert torch.equal(model(features), features)
    assert model.data_config is None
    with pytest.raises(ArgumentError, match=r"needs the width of the features: model_kwargs=\{'in_features': D\}"):
        TimmClassifier("identity", num_classes=7)


def test_the_identity_backbone_with_a_width_ends_in_a_linear_classifier() -> None:
    model = attached(TimmClassifier("identity", model_kwargs={"in_features": 5}), num_classes=7)
    head = model.network.get_classifier()
    assert isinstance(model.network, IdentityBackbone)
    features = torch.randn(3, 5)
    assert torch.allclose(model(features), features @ head.weight.T + head.bias)


def test_a_step_without_a_classifier_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="no classifier to train"):
        TimmClassifier("identity").training_step((torch.zeros(2, 5), torch.zeros(2, dtype=torch.long)), 0)
    with pytest.raises(ConfigurationError, match="no classifier to train"):  # before torch speaks of an empty list
        TimmClassifier("identity").configure_optimizers()


# ---- refusals


def test_an_unknown_backbone_is_named_with_its_neighbours() -> None:
    with pytest.raises(
        ArgumentError, match=r"backbone='resnet18x' is neither 'identity' nor a model of timm.*resnet18"
    ):
        TimmClassifier("resnet18x")


def test_an_unknown_tag_is_named_with_those_there_are() -> None:
    with pytest.raises(ArgumentError, match=r"timm has no weights 'r161_in1k' of test_vit, but .*r160_in1k"):
        TimmClassifier("test_vit.r161_in1k")


def test_arguments_that_timm_refuses_are_named() -> None:
    with pytest.raises(ArgumentError, match=r"refuses the model_kwargs \{'in_chan': 1\} for 'test_vit'.*in_chan"):
        TimmClassifier("test_vit", model_kwargs={"in_chan": 1})


def test_weights_that_cannot_be_fetched_are_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        raise FileNotFoundError("cannot find the requested files in the local cache.\nPlease check your connection")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(
        ConfigurationError, match=r"weights of 'test_vit' could not be fetched .*checkpoint_path"
    ) as told:
        TimmClassifier("test_vit", pretrained=True)
    assert "\n" not in str(told.value)


def test_really_offline_weights_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigurationError, match="weights of 'test_vit' could not be fetched"):
        TimmClassifier("test_vit", pretrained=True, model_kwargs={"cache_dir": str(tmp_path)})


def test_a_missing_file_of_weights_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"checkpoint_path='.*none.pth' is not a file"):
        TimmClassifier("test_vit", checkpoint_path=str(tmp_path / "none.pth"))


def test_a_file_of_weights_is_loaded_before_the_classifier_follows_the_data(tmp_path: Path) -> None:
    source = timm.create_model("test_vit", num_classes=5)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    model = TimmClassifier("test_vit", checkpoint_path=str(tmp_path / "w.pth"), model_kwargs={"num_classes": 5})
    assert torch.equal(model.network.head.weight, source.head.weight)
    attached(model, num_classes=7)
    assert torch.equal(model.network.norm.weight, source.norm.weight)
    assert model.network.num_classes == 7


def test_a_checkpoint_of_a_run_is_a_file_of_weights(tmp_path: Path) -> None:
    source = TimmClassifier("test_vit", num_classes=5)
    saved = {"pytorch-lightning_version": "2.6", "state_dict": {**source.state_dict(), "loss.weight": torch.ones(2)}}
    torch.save(saved, tmp_path / "run.ckpt")
    model = TimmClassifier("test_vit", checkpoint_path=tmp_path / "run.ckpt", num_classes=5)
    assert torch.equal(model.network.head.weight, source.network.head.weight)
    with pytest.raises(StateError, match="does not fit"):
        TimmClassifier("test_vit", checkpoint_path=tmp_path / "run.ckpt", num_classes=4)


def test_a_file_of_weights_that_does_not_fit_is_said(tmp_path: Path) -> None:
    torch.save(timm.create_model("test_vit", num_classes=5).state_dict(), tmp_path / "w.pth")
    with pytest.raises(StateError, match=r"w.pth' does not fit 'test_vit' with \{'num_classes': 6\}"):
        TimmClassifier("test_vit", checkpoint_path=str(tmp_path / "w.pth"), num_classes=6)


@pytest.mark.parametrize("smoothing", [-0.1, 1.0])
def test_label_smoothing_is_a_share(smoothing: float) -> None:
    with pytest.raises(ArgumentError, match="label_smoothing must lie in"):
        TimmClassifier("identity", label_smoothing=smoothing)


# ---- preprocessing of the backbone


def test_the_data_configuration_is_timms() -> None:
    config = TimmClassifier("resnet10t").data_config
    assert config is not None
    published = timm.get_pretrained_cfg("resnet10t")
    assert config["input_size"] == published.input_size
    assert config["mean"] == published.mean
    assert config["crop_pct"] == published.crop_pct


def test_the_data_configuration_follows_size_and_channels() -> None:
    config = TimmClassifier("test_vit", model_kwargs={"img_size": 32}).data_config
    assert config is not None
    assert config["input_size"] == (3, 32, 32)
    grey = TimmClassifier("resnet10t", model_kwargs={"in_chans": 1}).data_config
    assert grey is not None
    assert grey["input_size"][0] == 1
    assert grey["mean"] == pytest.approx([(0.485 + 0.456 + 0.406) / 3])
    assert grey["std"] == pytest.approx([(0.229 + 0.224 + 0.225) / 3])


# ---- steps


def test_the_loss_is_the_mean_over_labelled_rows() -> None:
    torch.manual_seed(0)
    model = TimmClassifier("identity", num_classes=4, model_kwargs={"in_features": 6}, label_smoothing=0.2)
    model.log = lambda *args, **kwargs: None
    features, targets = torch.randn(5, 6), torch.tensor([0, 3, -1, 2, -1], dtype=torch.int32)
    logits = model(features).double()
    likelihood = logits - logits.exp().sum(1, keepdim=True).log()
    rows = [-(0.8 * likelihood[i, targets[i]] + 0.2 * likelihood[i].mean()) for i in (0, 1, 3)]
    assert model.training_step((features, targets), 0).item() == pytest.approx(sum(rows).item() / 3, rel=1e-6)


def test_the_optimizer_and_the_schedule_are_the_users() -> None:
    model = TimmClassifier("identity", num_classes=4, model_kwargs={"in_features": 6})
    optimizer = model.configure_optimizers()
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.param_groups[0]["lr"] == 1e-3
    scheduled = TimmClassifier(
        "identity",
        num_classes=4,
        model_kwargs={"in_features": 6},
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.5),
        lr_scheduler=lambda own: torch.optim.lr_scheduler.StepLR(own, 1),
    ).configure_optimizers()
    assert isinstance(scheduled["optimizer"], torch.optim.SGD)
    assert scheduled["lr_scheduler"].optimizer is scheduled["optimizer"]


# ---- small images


def test_a_small_stem_is_one_convolution_that_keeps_every_pixel() -> None:
    options = {"layers": [1, 1, 1, 1], "channels": [8, 16, 32, 64], "stem_type": "deep", "stem_width": 4}
    torch.manual_seed(0)
    network = TimmClassifier("resnet18", small_images=True, num_classes=3, model_kwargs=options).network.eval()
    images = torch.randn(2, 3, 8, 8)
    expected = torch.nn.functional.conv2d(images, network.conv1.weight, padding=1)
    assert expected.shape == (2, 8, 8, 8)
    expected = network.layer1(torch.relu(network.bn1(expected)))
    expected = network.layer4(network.layer3(network.layer2(expected))).mean(dim=(2, 3))
    assert torch.allclose(network(images), network.fc(expected), atol=1e-6)
    assert network.conv1.weight.std().item() == pytest.approx((2 / (9 * 8)) ** 0.5, rel=0.1)


def test_a_wide_network_gets_a_wide_stem() -> None:
    network = TimmClassifier("resnet18", small_images=True, model_kwargs={"in_chans": 1}).network
    assert network.conv1.weight.shape == (64, 1, 3, 3)
    assert network.forward_features(torch.zeros(1, 1, 32, 32)).shape == (1, 512, 4, 4)


def test_a_small_stem_is_refused_where_there_is_none_to_replace(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"small_images=True needs one of timm's ResNets, .*'test_vit' has another"):
        TimmClassifier("test_vit", small_images=True)
    for weights in ({"pretrained": True}, {"checkpoint_path": str(tmp_path / "weights.pt")}):
        with pytest.raises(ArgumentError, match=r"small_images=True replaces the first layer of 'resnet18'"):
            TimmClassifier("resnet18", small_images=True, **weights)


def test_channels_last_is_the_same_network_in_another_layout() -> None:
    one, two = (
        TimmClassifier("resnet10t", num_classes=3, channels_last=channels_last).double()
        for channels_last in (False, True)
    )
    two.load_state_dict(one.state_dict())
    convolutions = [module for module in two.modules() if getattr(module, "kernel_size", None) == (3, 3)]
    assert convolutions
    for module in convolutions:
        assert module.weight.is_contiguous(memory_format=torch.channels_last)
    images = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    for model in (one, two):
        model(images).square().sum().backward()
    torch.testing.assert_close(two(images), one(images), rtol=0, atol=1e-10)
    for own, other in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(other.grad, own.grad, rtol=0, atol=1e-8)


def test_a_run_in_channels_last_resumes_with_the_same_bits(tmp_path: Path) -> None:
    def run(epochs: int, start: str | None = None) -> dict[str, torch.Tensor]:
        pl.seed_everything(1, verbose=False)
        model = TimmClassifier("resnet10t", num_classes=3, channels_last=True)
        trainer = quiet_trainer(tmp_path, max_epochs=epochs)
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(8, 3, 16, 16, generator=generator)
        samples = torch.utils.data.TensorDataset(images, torch.arange(8) % 3)
        trainer.fit(model, torch.utils.data.DataLoader(samples, batch_size=4), ckpt_path=start)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return dict(model.network.state_dict())

    run(1)
    resumed = run(2, str(tmp_path / "1.ckpt"))
    for key, value in run(2).items():
        assert torch.equal(value, resumed[key]), key


def test_channels_last_leaves_layers_alone_that_have_no_such_layout() -> None:
    model = TimmClassifier("lambda_resnet26t", num_classes=2, channels_last=True)  # has a convolution in 3 dimensions
    kinds = {parameter.ndim for parameter in model.parameters()}
    assert 5 in kinds
    assert model(torch.zeros(1, 3, 256, 256)).shape == (1, 2)


TINY = {
    "layers": [1] * 4,
    "channels": [4, 8, 16, 32],
    "stem_type": "deep",
    "stem_width": 2,
    "zero_init_last": False,
}


def test_channels_last_is_refused_where_it_would_overwrite_memory() -> None:
    with pytest.raises(ConfigurationError, match=r"channels_last is not safe .*'layer2.0.downsample.0'.* 4 input chan"):
        TimmClassifier("resnet18", small_images=True, channels_last=True, model_kwargs=TINY)
    safe = TimmClassifier(
        "resnet18", small_images=True, channels_last=True, model_kwargs={**TINY, "channels": [16, 16, 16, 32]}
    )
    assert safe.network.layer2[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_run_refuses_an_unsafe_layout_that_the_user_chose(tmp_path: Path) -> None:
    model = TimmClassifier("resnet18", num_classes=3, small_images=True, model_kwargs=TINY)
    model.to(memory_format=torch.channels_last)
    samples = torch.utils.data.TensorDataset(torch.randn(8, 3, 8, 8), torch.arange(8) % 3)
    trainer = quiet_trainer(tmp_path, strategy="onpro", max_epochs=1)
    with pytest.raises(ConfigurationError, match=r"channels_last is not safe .*'network.layer2.0.downsample.0'"):
        trainer.fit(model, torch.utils.data.DataLoader(samples, batch_size=4))
