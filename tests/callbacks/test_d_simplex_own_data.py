"""DSimplex as a stranger uses it: plain loaders, a log folder for each run, models of others."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from sklearn.datasets import load_digits
from small_runs import LitSmall, quiet_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from clkit.callbacks import DSimplex, attach_simplex_head
from clkit.data import ClassIncremental, StreamDataModule
from clkit.errors import ArgumentError, CapacityError, ConfigurationError, DataError, SignatureError, StateError

K = 12


def lit() -> LitSmall:
    torch.manual_seed(0)
    return LitSmall()


def rows(*labels: int) -> DataLoader[Any]:
    """Loads ten rows of each class."""
    y = torch.tensor(labels).repeat(10)
    return DataLoader(TensorDataset(torch.rand(len(y), 64), y), batch_size=10)


def fit(
    folder: Path, simplex: DSimplex, data: Any, *callbacks: pl.Callback, module: Any = None, **options: Any
) -> pl.Trainer:
    """Trains one pass of loaders, or a stream to its end."""
    path, plain = options.pop("ckpt_path", None), isinstance(data, DataLoader)
    trainer = quiet_trainer(folder, callbacks=[simplex, *callbacks], max_epochs=1 if plain else -1, **options)
    torch.manual_seed(1)
    where = {"train_dataloaders" if plain else "datamodule": data}
    trainer.fit(lit() if module is None else module, ckpt_path=path, **where)
    return trainer


def stream() -> StreamDataModule:
    return StreamDataModule("digits:flat", ClassIncremental(experiences=2), batch_size=120)


class SaveAt(pl.Callback):
    """Saves the run into its own log folder after some batch."""

    def __init__(self, batch: int) -> None:
        self.batch, self.path = batch, Path()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.batch -= 1
        if not self.batch:
            self.path = Path(str(trainer.log_dir)) / "checkpoints" / "some.ckpt"
            trainer.save_checkpoint(self.path)


def test_a_run_goes_on_in_a_log_folder_of_its_own_also_when_all_was_moved(tmp_path: Path) -> None:
    """Lightning gives every run a new version; the model before lies in that of the run which began the experience."""

    def go(save_at: int, ckpt_path: Path | None = None) -> tuple[SaveAt, dict[str, Tensor]]:
        saving, module = SaveAt(save_at), lit()
        logger = CSVLogger(tmp_path / "runs", name="some")
        options = {"logger": logger, "module": module, "ckpt_path": ckpt_path}
        fit(tmp_path, DSimplex(K, alignment="hoc"), stream(), saving, **options)
        return saving, module.state_dict()

    first, whole = go(6)  # in the second experience
    second, again = go(1, first.path)
    assert second.path.parent != first.path.parent
    _, third = go(0, second.path)
    (tmp_path / "runs").rename(tmp_path / "moved")
    _, moved = go(0, tmp_path / "moved" / first.path.relative_to(tmp_path / "runs"))
    for each in (again, third, moved):
        assert all(torch.equal(value, whole[name]) for name, value in each.items())
    (tmp_path / "moved" / "some" / "version_0" / "models" / "before_experience_1.pt").unlink()
    with pytest.raises(StateError, match=r"is not at .*runs.*version_1.*nor where it was \(.*runs.*version_0"):
        go(0, tmp_path / "moved" / first.path.relative_to(tmp_path / "runs"))


@pytest.mark.parametrize("side", ["low", "high"])
def test_classes_of_plain_loaders_have_vertices_that_nobody_else_has(side: Any, tmp_path: Path) -> None:
    """Ids up to the highest that came, as of a stream; none of them on a reserved vertex, from the first step on."""
    reserved = [0, 2, 11] if side == "low" else [0, 9, 11]
    vertices = [1, 3, 4, 5, 6, 7] if side == "low" else [10, 8, 7, 6, 5, 4]
    simplex, module = DSimplex(K, side=side, reserved=reserved), lit()
    fit(tmp_path, simplex, rows(0, 3), module=module)
    assert simplex.allocator.classes == [0, 1, 2, 3]
    first = module.net.head.vertex_of.clone()
    fit(tmp_path, simplex, rows(5, 2), module=module)
    assert simplex.allocator.rows(torch.arange(6)).tolist() == vertices
    assert module.net.head.vertex_of[:6].tolist() == vertices
    assert torch.equal(module.net.head.vertex_of, first)  # what was trained did not move
    with pytest.raises(CapacityError, match=r"4 new classes were asked for, .* 3 reserved and 3 free"):
        fit(tmp_path, simplex, rows(9), module=module)


def test_a_class_of_plain_loaders_without_a_vertex_is_refused_before_its_step(tmp_path: Path) -> None:
    simplex, module = DSimplex(K), lit()
    with pytest.raises(CapacityError, match="a training batch has a class with id 12, and"):
        fit(tmp_path, simplex, rows(1, 12), module=module)
    assert torch.equal(module.net.hidden.weight, lit().net.hidden.weight)
    with pytest.raises(ConfigurationError, match="these data do not say which classes they bring"):
        _distil(tmp_path)


def _distil(folder: Path) -> None:
    from clkit.strategies import ERStrategy

    strategy = ERStrategy(50, replay_batch=5, transform=nn.Identity())
    fit(folder, DSimplex(K, alignment="fd"), rows(1, 2), strategy=strategy)


def test_a_model_of_plain_loaders_says_which_vertices_are_taken(tmp_path: Path) -> None:
    path = tmp_path / "theirs.ckpt"
    fit(tmp_path, DSimplex(K), rows(0, 4)).save_checkpoint(path)
    ours = DSimplex(K, side="high", replacements={0: path})
    fit(tmp_path, ours, rows(0, 1))
    assert ours.allocator.reserved == [0, 1, 2, 3, 4]
    assert ours.allocator.rows(torch.tensor([0, 1])).tolist() == [11, 10]


def test_what_cannot_take_the_place_of_a_model_is_named_and_changes_nothing(tmp_path: Path) -> None:
    simplex, module = DSimplex(K), lit()
    with pytest.raises(ConfigurationError, match="the trainer has no module yet"):
        simplex.replace(quiet_trainer(tmp_path), tmp_path / "any.ckpt")
    trainer = fit(tmp_path, simplex, rows(0, 1), module=module)
    for wrong in (3, None, "none.ckpt"):
        with pytest.raises(ArgumentError, match=r"network must be a path|'none\.ckpt' is not a file"):
            simplex.replace(trainer, wrong)
    with pytest.raises(ConfigurationError, match=r"the function .* returned 'text'"):
        simplex.replace(trainer, lambda: "text")
    with pytest.raises(ConfigurationError, match="has no simplex head"):
        simplex.replace(trainer, lambda: nn.Linear(64, 10))
    paths = [tmp_path / name for name in ("vertices.ckpt", "width.ckpt", "weights.pt")]
    fit(tmp_path, DSimplex(K + 1), rows(0)).save_checkpoint(paths[0])
    wide = lit()
    wide.net.hidden, wide.net.head = nn.Linear(64, 20), nn.Linear(20, 10)
    fit(tmp_path, DSimplex(K), rows(7), module=wide).save_checkpoint(paths[1])
    torch.save(dict(lit().state_dict()), paths[2])
    before = {name: each.clone() for name, each in module.state_dict().items()}
    with pytest.raises(SignatureError, match=r"vertices\.ckpt has the vertices 'axis-simplex-v1/13'"):
        simplex.replace(trainer, paths[0])
    with pytest.raises(ConfigurationError, match=r"junction\.weight' is \(11, 20\) there and \(11, 16\)"):
        simplex.replace(trainer, paths[1])
    with pytest.raises(ConfigurationError, match=r"is missing there .*a function that builds its network"):
        simplex.replace(trainer, paths[2])
    assert simplex.allocator.classes == [0, 1]
    assert all(torch.equal(each, before[name]) for name, each in module.state_dict().items())
    with pytest.raises(ArgumentError, match=r"replacements\[1\]='late\.ckpt' is not a file"):  # known at the start
        fit(tmp_path, DSimplex(K, replacements={1: "late.ckpt"}), stream())


def test_a_network_of_another_party_is_taken_between_two_fits(tmp_path: Path) -> None:
    simplex, module = DSimplex(K, alignment="hoc", folder=tmp_path), lit()
    module.net.get_classifier = lambda: module.net.head  # type: ignore[assignment]  # as timm's networks have it
    trainer = fit(tmp_path, simplex, rows(0, 1), module=module)
    other = nn.Sequential(nn.Linear(64, 20), nn.Tanh(), nn.Linear(20, 10))
    other.get_classifier = lambda: other[-1]  # type: ignore[assignment]  # as timm has it
    attach_simplex_head(other, K)
    simplex.replace(trainer, other)
    fit(tmp_path, simplex, rows(2, 3), module=module)
    assert module.net is other
    start = torch.load(tmp_path / "before_experience_1.pt", weights_only=True)["state_dict"]
    assert start.keys() == module.state_dict().keys()
    assert not torch.equal(start["net.0.weight"], other[0].weight)  # trained on from there
    assert simplex.allocator.classes == [0, 1, 2, 3]


def test_a_network_narrower_than_its_classes_is_said_once(tmp_path: Path) -> None:
    module = lit()
    module.net.hidden, module.net.head = nn.Linear(64, 4), nn.Linear(4, 10)
    with pytest.warns(UserWarning, match="4 features, fewer than there are classes") as said:
        fit(tmp_path, DSimplex(K), stream(), module=module)  # five classes, then ten
    assert len([each for each in said if "fewer than there are classes" in str(each.message)]) == 1


def test_smoothed_labels_spread_over_all_vertices() -> None:
    """Those without a class too, whatever the order of the columns."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 10))
    place = attach_simplex_head(network, K)
    place.follow(DSimplex(K, side="high", reserved=[2]).allocator, "high")
    x, y = torch.randn(5, 8), torch.tensor([0, 3, 1, 0, 2])
    rows = place.head.prototypes()  # (K, d), float64
    z = x.double() @ place.head.junction.weight.double().T
    chances = torch.log_softmax(z @ rows.T, dim=1)
    wanted = -0.9 * chances[torch.arange(5), torch.tensor([11, 8, 10, 11, 9])] - 0.1 * chances.mean(dim=1)
    found = nn.functional.cross_entropy(network(x), y, label_smoothing=0.1)
    torch.testing.assert_close(found.double(), wanted.mean(), rtol=0, atol=1e-6)


# ---- the compatibility matrix of a run


def scored(queries: Tensor, wanted: Tensor, gallery: Tensor, owned: Tensor) -> float:
    """The share of queries whose nearest class mean, by the angle, is that of their class; in plain words."""
    ids = sorted(set(owned.tolist()))
    means = [nn.functional.normalize(gallery[owned == each].mean(0), dim=0) for each in ids]
    right = [
        ids[int(torch.stack(means).mv(query).argmax())] == int(label)
        for query, label in zip(queries, wanted, strict=True)
    ]
    return sum(right) / len(right)


class Keep(pl.Callback):
    """Features of both sides by the model of each experience."""

    def __init__(self, simplex: DSimplex, *sides: Tensor) -> None:
        self.simplex, self.sides, self.found = simplex, sides, []

    def on_experience_end(self, trainer: pl.Trainer, module: pl.LightningModule, experience: Any) -> None:
        self.found.append([self.simplex.embed(module, side).double() for side in self.sides])


def parts() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The two halves of the digits, as the source "digits:flat" has them."""
    data = load_digits()
    x, y = torch.from_numpy(data.data).float() / 16, torch.from_numpy(data.target)
    return (x[::2], y[::2]), (x[1::2], y[1::2])


@pytest.mark.parametrize("form", ["a source", "loaders"])
def test_a_run_searches_with_each_model_in_the_galleries_of_all_before(
    form: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    queries, gallery = parts()
    sides: dict[str, Any] = {"queries": "digits:flat/train", "gallery": "digits:flat/test"}
    if form == "loaders":
        sides = {
            name: DataLoader(TensorDataset(*side), 500) for name, side in zip(sides, (queries, gallery), strict=True)
        }
    simplex, saving = DSimplex(K, **sides), SaveAt(6)
    keep = Keep(simplex, queries[0], gallery[0])
    logger = CSVLogger(tmp_path, name="some")
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        fit(tmp_path, simplex, stream(), saving, keep, logger=logger, log_every_n_steps=100)
    wanted = [
        [
            scored(asked, queries[1], kept, gallery[1]) if j <= i else float("nan")
            for j, (_, kept) in enumerate(keep.found)
        ]
        for i, (asked, _) in enumerate(keep.found)
    ]
    found = simplex.compatibility
    # of 899 queries one may fall to the other side where the gallery is kept in half precision
    assert torch.allclose(found, torch.tensor(wanted, dtype=torch.float64), atol=1.5 / 899, equal_nan=True)
    assert found[0, 0] > 0.15
    written = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    logged = [row for row in csv.DictReader(written) if row["compatibility/am"]]
    assert [float(row["compatibility/am"]) for row in logged] == pytest.approx(
        [float(found[0, 0]), float(found[0, 0] + found[1, 0] + found[1, 1]) / 3]
    )
    assert float(logged[1]["compatibility/ac"]) == float(found[1, 0] > found[0, 0])
    told = [each.message for each in caplog.records if "in the galleries of models 1 to 2" in each.message]
    assert len(told) == 1
    again = DSimplex(K, **sides)  # what an earlier part of the run measured goes on
    fit(tmp_path, again, stream(), logger=CSVLogger(tmp_path, name="some"), ckpt_path=saving.path)
    assert torch.equal(again.compatibility.nan_to_num(-1), found.nan_to_num(-1))


def test_a_search_that_cannot_be_is_refused_before_anything_is_learned(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="queries is given and gallery is not"):
        DSimplex(K, queries="digits/train")
    for wrong in ("digits", "digits/all", "/test", 3, iter([])):
        with pytest.raises(ArgumentError, match="gallery must be"):
            DSimplex(K, queries="digits/train", gallery=wrong)  # type: ignore[arg-type]  # that is the point
    with pytest.raises(DataError, match="nothing is at"):
        fit(tmp_path, DSimplex(K, queries="digits/train", gallery="npz:./none/test"), stream())
    with pytest.raises(ConfigurationError, match="there is none; give queries and gallery as loaders"):
        fit(tmp_path, DSimplex(K, queries="digits/train", gallery="digits/test"), rows(0, 1))
