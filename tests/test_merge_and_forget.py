"""Merged checkpoints equal one run over everything; after forgetting, a run that never saw the samples."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from small_runs import LitSmall, put, quiet_trainer, run_settings
from torch import Tensor
from torch.utils.data import TensorDataset

from clkit import forget_samples, load_head, merge_checkpoints
from clkit.callbacks import AEFOCL, LDA, NMC, Lift, StreamEvaluation
from clkit.cli.main import main
from clkit.data import ClassIncremental, Custom, StreamDataModule
from clkit.errors import ArgumentError, BatchError, ConfigurationError, DataError, StateError
from clkit.files import read_checkpoint
from clkit.methods import AnalyticHead, LDAHead, NearestMeanHead
from clkit.runs.forgetting import read_samples
from clkit.runs.merging import HeadSummary, classifier_keys
from clkit.schema import MERGED, STRATEGY

Make = Callable[..., Any]

# name -> callback in a run, and the same head by hand
KINDS: dict[str, tuple[Callable[[str], Any], Callable[[int], Any]]] = {
    "ridge": (lambda n: AEFOCL(balance="none", name=n), AnalyticHead),
    "bias": (lambda n: AEFOCL(balance="none", bias=True, name=n), lambda d: AnalyticHead(d, bias=True)),
    "pfg": (lambda n: AEFOCL(name=n), lambda d: AnalyticHead(d, balance="pfg")),
    "expected": (lambda n: AEFOCL(balance="expected", name=n), lambda d: AnalyticHead(d, balance="expected")),
    "reweight": (lambda n: AEFOCL(balance="reweight", name=n), lambda d: AnalyticHead(d, balance="reweight")),
    "lifted": (
        lambda n: AEFOCL(0.1, Lift(40), balance="pfg", name=n),
        lambda d: AnalyticHead(d, gamma=0.1, expansion_dim=40, balance="pfg"),
    ),
    "janson": (lambda n: NMC(name=n), NearestMeanHead),
    "euclidean": (lambda n: NMC("euclidean", name=n), lambda d: NearestMeanHead(d, metric="euclidean")),
    "icarl": (lambda n: NMC("icarl", name=n), lambda d: NearestMeanHead(d, metric="icarl")),
    "cosine": (lambda n: NMC("cosine", name=n), lambda d: NearestMeanHead(d, metric="cosine")),
    "lda": (lambda n: LDA(name=n), LDAHead),
}


def all_callbacks() -> list[Any]:
    return [make(name) for name, (make, _) in KINDS.items()]


def digits() -> tuple[Tensor, Tensor]:
    images, targets = load_digits(return_X_y=True)
    return torch.from_numpy(images / 16).float(), torch.from_numpy(targets)


def features_of(module: Any, images: Tensor) -> Tensor:
    """By hand, of the small network."""
    with torch.no_grad():
        return torch.relu(module.net.hidden(images))


def stream(rows: Any, **options: Any) -> StreamDataModule:
    images, targets = digits()
    train = TensorDataset(images[rows], targets[rows])
    asked = 1500 + torch.nonzero(torch.isin(targets[1500:], targets[rows]))[:, 0]
    test = TensorDataset(images[asked], targets[asked])
    return StreamDataModule(Custom(train, test), ClassIncremental(experiences=2), **options)


# parts of the digits that overlap in no sample, the second without class 9
FIRST = torch.arange(0, 500)
SECOND = torch.arange(500, 900)[digits()[1][500:900] != 9]


@pytest.fixture
def run(make_trainer: Make, lit_small: Make, tmp_path: Path) -> Callable[..., Path]:
    """Learns some rows and saves a checkpoint; gives its path."""

    def learn(
        name: str, rows: Any, callbacks: list[Any], module: Any = None, resume: Path | None = None, **options: Any
    ) -> Path:
        trainer = make_trainer(strategy="gradient_free", callbacks=callbacks)
        trainer.fit(lit_small() if module is None else module, datamodule=stream(rows, **options), ckpt_path=resume)
        path = tmp_path / f"{name}.ckpt"
        trainer.save_checkpoint(path)
        return path

    return learn


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one checkpoint of each part, learned by all heads; made once."""
    folder = tmp_path_factory.mktemp("runs")
    for name, rows in (("first", FIRST), ("second", SECOND)):
        torch.manual_seed(0)
        callbacks = [*all_callbacks(), StreamEvaluation(table=False, files=False)]
        trainer = quiet_trainer(folder, strategy="gradient_free", callbacks=callbacks)
        trainer.fit(LitSmall(), datamodule=stream(rows))
        trainer.save_checkpoint(folder / f"{name}.ckpt")
    return folder


def assert_equal_heads(head: Any, wanted: Any, features: Tensor) -> None:
    assert torch.equal(head.classes, wanted.classes)
    assert torch.equal(head.counts, wanted.counts)
    scores, expected = head.scores_seen(features), wanted.scores_seen(features)
    assert float((scores - expected).abs().max()) <= 1e-8 * max(1.0, float(expected.abs().max()))


def by_hand(kind: str, features: Tensor, targets: Tensor) -> Any:
    head = KINDS[kind][1](features.shape[1])
    head.update(features, targets)
    return head


# ---- merge


def test_merged_heads_equal_one_run_over_everything(finished: Path, lit_small: Make, tmp_path: Path) -> None:
    learned = merge_checkpoints([finished / "first.ckpt", finished / "second.ckpt"], tmp_path / "both.ckpt")
    images, targets = digits()
    rows = torch.cat([SECOND, FIRST])
    features = features_of(lit_small(), images)
    for kind in KINDS:
        wanted = by_hand(kind, features[rows], targets[rows])
        assert_equal_heads(load_head(tmp_path / "both.ckpt", kind), wanted, features[1500:])
    assert {(entry.samples, entry.classes) for entry in learned} == {(len(rows), 10)}


def test_edits_of_a_log_that_is_left_out_are_named(finished: Path, tmp_path: Path) -> None:
    parts = [tmp_path / f"{name}.ckpt" for name in "ab"]
    for part, name, committed in zip(parts, ("first", "second"), (True, False), strict=True):
        saved = torch.load(finished / f"{name}.ckpt", weights_only=True)
        saved["callbacks"]["MEND(mend)"] = {"edits": [{"id": 0, "committed": committed}]}
        torch.save(saved, part)
    with pytest.warns(UserWarning, match=r"clkit: \S*b\.ckpt: edits in their logs are part of the merged heads"):
        merge_checkpoints(parts, tmp_path / "both.ckpt")


def test_what_a_merged_file_is_good_for(finished: Path, make_trainer: Make, lit_small: Make, tmp_path: Path) -> None:
    path = tmp_path / "both.ckpt"
    merge_checkpoints([finished / "first.ckpt", finished / "second.ckpt"], path)
    saved = read_checkpoint(path)
    assert not saved.keys() & {"loops", "optimizer_states", "lr_schedulers"}
    assert saved["callbacks"]["StreamEvaluation"]["rows"] == {}
    callbacks = [*all_callbacks(), evaluation := StreamEvaluation(table=False, files=False)]
    trainer, module = make_trainer(callbacks=callbacks), lit_small()
    (numbers,) = trainer.validate(module, datamodule=stream(FIRST), ckpt_path=path, verbose=False)
    images, targets = digits()
    for kind in KINDS:
        predicted = load_head(path, kind).predict(features_of(module, images[1500:]))
        assert numbers[f"{kind}/accuracy"] == pytest.approx(float((predicted == targets[1500:]).double().mean()))
    assert evaluation.results == {}
    trainer.predict(module, datamodule=stream(FIRST), ckpt_path=path)
    for strategy in ("gradient_free", "auto"):
        fit = make_trainer(strategy=strategy, callbacks=callbacks)
        with pytest.raises(StateError, match=r"no fit can go on .* merged from .*first\.ckpt, .*second\.ckpt"):
            fit.fit(lit_small(), datamodule=stream(FIRST), ckpt_path=path)


def test_merged_files_can_be_merged(finished: Path, run: Callable[..., Path], lit_small: Make, tmp_path: Path) -> None:
    rest = run("third", torch.arange(1000, 1200), all_callbacks())
    merge_checkpoints([finished / "second.ckpt", rest], tmp_path / "two.ckpt")
    merge_checkpoints([tmp_path / "two.ckpt", finished / "first.ckpt"], tmp_path / "three.ckpt")
    merge_checkpoints([finished / "first.ckpt", finished / "second.ckpt", rest], tmp_path / "at_once.ckpt")
    images, _ = digits()
    features = features_of(lit_small(), images[1500:])
    for kind in KINDS:
        head = load_head(tmp_path / "three.ckpt", kind)
        assert_equal_heads(head, load_head(tmp_path / "at_once.ckpt", kind), features)


@pytest.mark.warns("no state for StreamEvaluation")
def test_an_evaluation_goes_as_far_as_the_further_run(
    run: Callable[..., Path], make_trainer: Make, lit_small: Make, tmp_path: Path
) -> None:
    near = run("near", FIRST, [NMC()], stop_after=1)
    far = run("far", torch.arange(500, 900), [NMC()])
    for parts in ([near, far], [far, near]):
        merge_checkpoints(parts, tmp_path / "both.ckpt", overwrite=True)
        evaluation = StreamEvaluation(table=False, files=False)
        data = stream(FIRST)
        make_trainer(callbacks=[NMC(), evaluation]).validate(
            lit_small(), datamodule=data, ckpt_path=tmp_path / "both.ckpt", verbose=False
        )
        assert {index for index, _ in data.val_dataloader().batches} == {0, 1}
    # of other streams nothing is taken over
    images, targets = digits()
    other = TensorDataset(images[:200], targets[:200])
    trainer = make_trainer(strategy="gradient_free", callbacks=[NMC()])
    trainer.fit(lit_small(), datamodule=StreamDataModule(Custom(other, other), ClassIncremental(experiences=5)))
    trainer.save_checkpoint(tmp_path / "five.ckpt")
    merge_checkpoints([near, tmp_path / "five.ckpt"], tmp_path / "mixed.ckpt")
    assert "StreamDataModule" not in read_checkpoint(tmp_path / "mixed.ckpt")


@pytest.mark.parametrize("head", ["euclidean", "janson"])
def test_a_grafted_classifier_is_the_merged_one(
    run: Callable[..., Path], make_trainer: Make, lit_small: Make, head: str, tmp_path: Path
) -> None:
    parts = [
        run(str(index), rows, [NMC(head, name="h", graft="experience_end")])
        for index, rows in enumerate((FIRST, SECOND))
    ]
    merge_checkpoints(parts, tmp_path / "both.ckpt")
    images, _ = digits()
    bare = lit_small()
    bare.load_state_dict(read_checkpoint(tmp_path / "both.ckpt")["state_dict"], strict=True)
    merged = load_head(tmp_path / "both.ckpt", "h")
    wanted = merged.predict(features_of(bare, images[1500:]))
    if head == "euclidean":  # a plain linear layer, which stands in the module's own weights
        with torch.no_grad():
            assert (bare(images[1500:]).argmax(1) == wanted).float().mean() > 0.99
    module, callback = lit_small(), NMC(head, name="h", graft="experience_end")
    make_trainer(callbacks=[callback]).validate(
        module, datamodule=stream(FIRST), ckpt_path=tmp_path / "both.ckpt", verbose=False
    )
    module.eval()
    with torch.no_grad():
        assert (module(images[1500:]).argmax(1) == wanted).float().mean() > 0.99
    callback.ungraft(module)
    for name, value in lit_small().state_dict().items():
        assert torch.equal(module.state_dict()[name], value), name


# small files without a run, for what is refused and for invariants


def entry(head: Any, **changes: Any) -> dict[str, Any]:
    return {"head": dict(head.state_dict()), "in_features": head.in_features, "tap": "fc:in", **changes}


def file_of(path: Path, entries: dict[str, Any], weights: dict[str, Tensor] | None = None, **strategy: Any) -> Path:
    saved = {"state_dict": weights or {}, "callbacks": entries}
    torch.save({**saved, STRATEGY: {"strategy": "onpro", **strategy}} if strategy else saved, path)
    return path


def taught(head: Any, labels: tuple[int, ...] = (0, 1)) -> Any:
    rows = torch.randn(4 * len(labels), head.in_features, generator=torch.Generator().manual_seed(len(labels)))
    head.update(rows, torch.tensor(labels).repeat(4))
    return head


def nmc(width: int = 4, tap: str = "fc:in", **options: Any) -> dict[str, Any]:
    return entry(taught(NearestMeanHead(width, **options)), tap=tap)


WEIGHTS = {"network.layer.weight": torch.ones(2), "network.fc.weight": torch.ones(3), "network.fc.bias": torch.ones(3)}
LDA_ENTRY = entry(taught(LDAHead(4)))
RECURSIVE = entry(taught(AnalyticHead(4, solver="recursive")))


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"NMC(nmc)": nmc(5)}, r"width 4 in .* and 5 in .*b\.ckpt"),
        ({"NMC(nmc)": nmc(tap="body:out")}, r"features read at 'fc:in' in .* and 'body:out' in"),
        ({"NMC(nmc)": nmc(metric="icarl")}, r"different metric: 'janson' here, 'icarl' there"),
        ({"NMC(nmc)": LDA_ENTRY}, r"a NearestMeanHead cannot merge a LDAHead"),
        ({"NMC(other)": nmc()}, r"NMC\(nmc\) is in .*a\.ckpt but not"),
        ({"NMC(nmc)": nmc(), "LDA(lda)": LDA_ENTRY}, r"LDA\(lda\) is in .*b\.ckpt but not in .*a\.ckpt, which has"),
        ({"ModelCheckpoint": {"best": 1}}, r"b\.ckpt holds no learned head .*\['ModelCheckpoint'\]"),
        ({"AEFOCL(aef_ocl)": RECURSIVE}, r'solver="recursive", which keeps a solution and no sums'),
    ],
)
def test_heads_that_do_not_fit_together_are_refused(entries: dict[str, Any], said: str, tmp_path: Path) -> None:
    a = file_of(tmp_path / "a.ckpt", {"NMC(nmc)": nmc()}, WEIGHTS)
    b = file_of(tmp_path / "b.ckpt", entries, WEIGHTS)
    with pytest.raises((StateError, ConfigurationError), match=said):
        merge_checkpoints([a, b], tmp_path / "c.ckpt")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.ckpt", "b.ckpt"]


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({"network.layer.weight": torch.zeros(2)}, r"differ in 'network\.layer\.weight', so their features cannot be"),
        ({"network.layer.weight": torch.ones(2).double()}, r"differ in 'network\.layer\.weight'"),
        ({"network.extra": torch.zeros(2)}, r"b\.ckpt holds another network .*a\.ckpt, which has no 'network\.extra'"),
    ],
)
def test_networks_that_differ_are_refused(weights: dict[str, Tensor], said: str, tmp_path: Path) -> None:
    a = file_of(tmp_path / "a.ckpt", {"NMC(nmc)": nmc()}, WEIGHTS)
    b = file_of(tmp_path / "b.ckpt", {"NMC(nmc)": nmc()}, {**WEIGHTS, **weights})
    with pytest.raises(StateError, match=said):
        merge_checkpoints([a, b], tmp_path / "c.ckpt")


def test_the_classifier_alone_may_differ(tmp_path: Path) -> None:
    entries = {"NMC(nmc)": nmc()}
    a = file_of(tmp_path / "a.ckpt", entries, WEIGHTS)
    b = file_of(tmp_path / "b.ckpt", entries, {**WEIGHTS, "network.fc.weight": torch.zeros(3)})
    merge_checkpoints([a, b], tmp_path / "c.ckpt")
    assert torch.equal(read_checkpoint(tmp_path / "c.ckpt")["state_dict"]["network.fc.weight"], torch.ones(3))
    # a second head that reads behind the classifier depends on it
    both = {**entries, "NMC(far)": nmc(tap="output")}
    a, b = file_of(a, both, WEIGHTS), file_of(b, both, {**WEIGHTS, "network.fc.weight": torch.zeros(3)})
    with pytest.raises(StateError, match=r"differ in 'network\.fc\.weight'"):
        merge_checkpoints([a, b], tmp_path / "d.ckpt")


@pytest.mark.parametrize(
    ("keys", "point", "found"),
    [
        (
            ["net.fc.weight", "net.fc.bias", "net.a.se.fc.weight", "net.afc.bias"],
            "fc:in",
            ["net.fc.weight", "net.fc.bias"],
        ),
        (["fc.0.weight", "fc.2.weight", "body.weight"], "fc:in", ["fc.0.weight", "fc.2.weight"]),
        (["n.head.0.bias", "n.head.1.bias", "n.x"], "head.0+head.1:in", ["n.head.0.bias", "n.head.1.bias"]),
        (["n.head.bias", "n.head_dist.bias"], "head|head_dist:in", ["n.head.bias", "n.head_dist.bias"]),
        (["a.fc.bias", "b.fc.bias"], "fc:in", []),  # which of the two is not known
        (["a.fc.bias"], "fc:out", []),
        (["a.fc.bias"], "output", []),
    ],
)
def test_the_keys_of_the_classifier(keys: list[str], point: str, found: list[str]) -> None:
    assert classifier_keys(dict.fromkeys(keys), point) == found


def test_files_are_checked(tmp_path: Path) -> None:
    a = file_of(tmp_path / "a.ckpt", {"NMC(nmc)": nmc()})
    b = shutil.copy(a, tmp_path / "b.ckpt")
    (tmp_path / "link.ckpt").symlink_to(a)
    for files, output, said in (
        ([a], "c.ckpt", "at least two"),
        ([a, b, a], "c.ckpt", r"a\.ckpt is given twice"),
        ([a, tmp_path / "link.ckpt"], "c.ckpt", "is given twice"),
        ([a, tmp_path / "no.ckpt"], "c.ckpt", "is not a file"),
        ([a, b], "b.ckpt", "is one of the files that are read; give another name, or --force"),
        ([a, b], "no/c.ckpt", "there is no folder"),
    ):
        with pytest.raises(ArgumentError, match=said):
            merge_checkpoints(files, tmp_path / output)
    before = Path(b).read_bytes()
    (tmp_path / "c.ckpt").write_text("mine")
    with pytest.raises(ArgumentError, match="exists"):
        merge_checkpoints([a, b], tmp_path / "c.ckpt")
    assert (tmp_path / "c.ckpt").read_text() == "mine"
    merge_checkpoints([a, b], tmp_path / "c.ckpt", overwrite=True)
    assert read_checkpoint(tmp_path / "c.ckpt")[MERGED] == [str(a), str(b)]
    assert Path(b).read_bytes() == before


SIZES = st.lists(st.integers(0, 12), min_size=2, max_size=4)


@settings(max_examples=25, deadline=None)
@given(sizes=SIZES, kind=st.sampled_from(sorted(KINDS)), seed=st.integers(0, 99))
def test_any_partition_in_any_order_gives_the_same(sizes: list[int], kind: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    total = sum(sizes) + 6
    rows = torch.randn(total, 4, generator=generator)
    targets = torch.cat([torch.arange(6) % 3, torch.randint(0, 3, (sum(sizes),), generator=generator)])
    parts = list(zip(rows.split([6, *sizes]), targets.split([6, *sizes]), strict=True))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = []
        for index, (own_rows, own_targets) in enumerate(parts):
            head = by_hand(kind, own_rows, own_targets)
            files.append(file_of(folder / f"{index}.ckpt", {f"X({kind})": entry(head)}))
        merge_checkpoints(files, folder / "forwards.ckpt")
        merge_checkpoints(files[::-1], folder / "backwards.ckpt")
        wanted = by_hand(kind, rows, targets)
        for file in ("forwards", "backwards"):
            assert_equal_heads(load_head(folder / f"{file}.ckpt", kind), wanted, rows)


@settings(max_examples=25, deadline=None)
@given(kind=st.sampled_from(sorted(KINDS)), gone=st.sets(st.integers(0, 19), max_size=17), seed=st.integers(0, 99))
def test_forgetting_any_samples_equals_never_having_seen_them(kind: str, gone: set[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows, targets = torch.randn(23, 4, generator=generator), torch.randint(0, 3, (23,), generator=generator)
    out = torch.zeros(23, dtype=torch.bool)
    out[sorted(gone)] = True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = file_of(folder / "run.ckpt", {f"X({kind})": entry(by_hand(kind, rows, targets))})
        forget_samples(path, folder / "less.ckpt", features=rows[out], targets=targets[out])
        assert_equal_heads(load_head(folder / "less.ckpt", kind), by_hand(kind, rows[~out], targets[~out]), rows)


# ---- forget


def test_after_forgetting_all_heads_are_those_of_the_rest(finished: Path, lit_small: Make, tmp_path: Path) -> None:
    images, targets = digits()
    features = features_of(lit_small(), images)
    gone = torch.cat([FIRST[::7], FIRST[targets[FIRST] == 4]]).unique()  # all of class 4, too
    before = (finished / "first.ckpt").read_bytes()
    learned = forget_samples(
        finished / "first.ckpt", tmp_path / "less.ckpt", features=features[gone], targets=targets[gone]
    )
    kept = FIRST[~torch.isin(FIRST, gone)]
    for kind in KINDS:
        wanted = by_hand(kind, features[kept], targets[kept])
        assert_equal_heads(load_head(tmp_path / "less.ckpt", kind), wanted, features[1500:])
    assert HeadSummary(learned[0].head, len(kept), 9) == learned[0]
    assert (finished / "first.ckpt").read_bytes() == before


def test_some_heads_alone(finished: Path, lit_small: Make, tmp_path: Path) -> None:
    images, targets = digits()
    features = features_of(lit_small(), images)[:50]
    forget_samples(
        finished / "first.ckpt",
        tmp_path / "less.ckpt",
        features=features,
        targets=targets[:50],
        heads=["janson", "lda"],
    )
    for kind in KINDS:
        left = int(load_head(tmp_path / "less.ckpt", kind).counts.sum())
        assert left == (450 if kind in ("janson", "lda") else 500)
    with pytest.raises(ArgumentError, match=r"heads=\['nmc'\]: .* has the heads \['bias', 'cosine'"):
        forget_samples(
            finished / "first.ckpt", tmp_path / "no.ckpt", features=features, targets=targets[:50], heads=["nmc"]
        )


@pytest.mark.parametrize("batches", [None, 5])
def test_a_run_goes_on_after_forgetting(
    run: Callable[..., Path], make_trainer: Make, lit_small: Make, tmp_path: Path, batches: int | None
) -> None:
    """From the end of an experience, and from its middle: what was passed is not learned again."""
    images, targets = digits()
    features = features_of(lit_small(), images)
    if batches is None:
        path = run("half", FIRST, all_callbacks(), stop_after=1)
    else:
        trainer = make_trainer(strategy="gradient_free", callbacks=all_callbacks(), max_steps=batches)
        trainer.fit(lit_small(), datamodule=stream(FIRST))
        trainer.save_checkpoint(path := tmp_path / "half.ckpt")
    state = read_checkpoint(path)["StreamDataModule"]
    data = stream(FIRST)
    data.setup("fit")
    first = data.training_rows(0)
    passed = np.unique(np.concatenate([rows for _, rows in data.learned_batches(state, first)]))
    assert len(passed) == (len(first) if batches is None else 32 * batches) or batches is not None
    gone = torch.from_numpy(passed[::3])  # rows of the training part are the first digits
    forget_samples(path, tmp_path / "less.ckpt", features=features[gone], targets=targets[gone])
    whole = run("whole", FIRST, all_callbacks(), resume=tmp_path / "less.ckpt")
    kept = FIRST[~torch.isin(FIRST, gone)]
    for kind in KINDS:
        wanted = by_hand(kind, features[kept], targets[kept])
        assert_equal_heads(load_head(whole, kind), wanted, features[1500:])


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("head", ["euclidean", "janson"])
def test_a_grafted_classifier_forgets_too(
    run: Callable[..., Path], make_trainer: Make, lit_small: Make, head: str, everything: bool, tmp_path: Path
) -> None:
    path = run("run", FIRST, [NMC(head, graft="experience_end")])
    images, targets = digits()
    features = features_of(lit_small(), images)
    gone = FIRST if everything else FIRST[targets[FIRST] == 3]
    forget_samples(path, tmp_path / "less.ckpt", features=features[gone], targets=targets[gone])
    saved = read_checkpoint(tmp_path / "less.ckpt")
    bare = lit_small()
    own = {name: value.clone() for name, value in bare.state_dict().items()}
    bare.load_state_dict(saved["state_dict"], strict=True)
    if everything or head == "janson":
        assert all(torch.equal(bare.state_dict()[name], own[name]) for name in own)
    else:
        assert bool(bare.net.head.weight[3].eq(0).all())
    module, callback = lit_small(), NMC(head, graft="experience_end")
    with pytest.warns(UserWarning, match="it has learned nothing") if everything else nullcontext():
        make_trainer(callbacks=[callback]).validate(
            module, datamodule=stream(FIRST), ckpt_path=tmp_path / "less.ckpt", verbose=False
        )
    assert callback.grafted is not everything
    module.eval()
    with torch.no_grad():
        if everything:
            assert torch.equal(module(images[1500:]), lit_small()(images[1500:]))
        else:
            kept = FIRST[targets[FIRST] != 3]
            wanted = by_hand(head, features[kept], targets[kept]).predict(features[1500:])
            assert (module(images[1500:]).argmax(1) == wanted).float().mean() > 0.99


@pytest.mark.parametrize(
    ("features", "targets", "said"),
    [
        (torch.zeros(9, 4), torch.zeros(9).long(), r"subtract 9 samples of class 0: only 4 were"),
        (torch.zeros(1, 4), torch.tensor([7]), r"subtract 1 samples of class 7: only 0 were learned"),
        (torch.zeros(1, 3), torch.tensor([0]), r"NMC\(nmc\): .*3"),
        (torch.full((1, 4), torch.nan), torch.tensor([0]), "not finite"),
        (torch.zeros(2, 4), torch.tensor([0]), "2"),
    ],
)
def test_samples_that_cannot_have_been_learned_are_refused(
    features: Tensor, targets: Tensor, said: str, tmp_path: Path
) -> None:
    path = file_of(tmp_path / "a.ckpt", {"NMC(nmc)": nmc()})
    with pytest.raises(BatchError, match=said):
        forget_samples(path, tmp_path / "b.ckpt", features=features, targets=targets)
    assert not (tmp_path / "b.ckpt").exists()


def test_a_head_that_cannot_forget_stops_all(tmp_path: Path) -> None:
    rows, targets = torch.eye(4), torch.tensor([0, 0, 1, 1])
    entries = {"NMC(nmc)": NearestMeanHead(4), "AEFOCL(aef_ocl)": AnalyticHead(4, solver="recursive")}
    for head in entries.values():
        head.update(rows, targets)
    path = file_of(tmp_path / "a.ckpt", {key: entry(head) for key, head in entries.items()})
    with pytest.raises(ConfigurationError, match=r'AEFOCL\(aef_ocl\): solver="recursive" cannot subtract'):
        forget_samples(path, tmp_path / "b.ckpt", features=rows[:1], targets=targets[:1])
    assert not (tmp_path / "b.ckpt").exists()
    forget_samples(path, tmp_path / "b.ckpt", features=rows[:1], targets=targets[:1], heads=["nmc"])


def test_heads_that_read_at_several_places_forget_one_place_at_a_time(tmp_path: Path) -> None:
    entries = {"NMC(a)": nmc(), "NMC(b)": nmc(tap="x:out")}
    path = file_of(tmp_path / "a.ckpt", entries)
    with pytest.raises(ConfigurationError, match=r"at several places, .*'fc:in'.*'x:out'.*--heads"):
        forget_samples(path, tmp_path / "b.ckpt", features=torch.ones(1, 4), targets=torch.tensor([0]))
    forget_samples(path, tmp_path / "b.ckpt", features=torch.ones(1, 4), targets=torch.tensor([0]), heads=["b"])


@pytest.mark.filterwarnings("ignore:unclosed file")  # which NumPy leaves open
def test_files_of_samples(tmp_path: Path) -> None:
    path = tmp_path / "s.npz"
    np.savez(path, features=np.ones((2, 4), np.float32), targets=np.array([0, 1], np.uint8))
    samples = read_samples(path)
    assert samples["features"].dtype == torch.float32
    assert samples["targets"].tolist() == [0, 1]
    np.savez(path, ids=np.array([3, 1], np.int32))
    assert read_samples(path) == {"ids": [3, 1]}
    for arrays, said in (
        ({"ids": np.array([None, 1], dtype=object)}, "ids is an array of Python objects, which is not read"),
        ({"features": np.array([{}, 1]), "targets": np.zeros(2)}, "features is an array of Python objects"),
        ({"ids": np.array([0.5])}, "ids must be integers"),
        ({"ids": np.array([[1]])}, r"one dimension .* shape \(1, 1\)"),
        ({"ids": np.array([], np.int64)}, "at least one"),
        ({"ids": np.array([1, 2, 1])}, r"ids has \[1\] more than once"),
        ({"features": np.ones((2, 4))}, r"has the arrays \['features'\]; it must have features and targets, or ids"),
        ({"features": np.ones((1, 4)), "targets": np.array([0.0])}, "targets integers, got float64 and float64"),
        ({"features": np.ones((1, 4), np.int64), "targets": np.array([0])}, "floating-point"),
    ):
        np.savez(path, **arrays)
        with pytest.raises(DataError, match=said):
            read_samples(path)
    for content in (b"", b"PK\x03\x04 broken", b"not a zip at all"):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"is no \.npz file"):
            read_samples(path)
    np.save(tmp_path / "s.npy", np.ones(2))
    with pytest.raises(DataError, match=r"is no \.npz file"):
        read_samples(tmp_path / "s.npy")
    with pytest.raises(DataError, match="there is no such file"):
        read_samples(tmp_path / "no.npz")
    np.savez(path, ids=np.arange(50))
    damaged = bytearray(path.read_bytes())
    damaged[200] ^= 255
    path.write_bytes(bytes(damaged))
    with pytest.raises(DataError, match=r"is no \.npz file"):
        read_samples(path)


def test_a_damaged_file_gives_no_python_object(tmp_path: Path) -> None:
    """An array of objects in a zip is a pickle; it must never be loaded."""
    np.savez(tmp_path / "s.npz", ids=np.array([Marker()], dtype=object))
    with pytest.raises(DataError, match="Python objects"):
        read_samples(tmp_path / "s.npz")
    assert not Marker.loaded


class Marker:
    loaded = False

    def __reduce__(self) -> Any:
        return (_mark, ())


def _mark() -> None:
    Marker.loaded = True


@pytest.mark.parametrize("given", [{}, {"ids": [1], "features": torch.ones(1, 4), "targets": torch.tensor([0])}])
def test_what_is_to_be_forgotten_is_given_once(given: dict[str, Any], tmp_path: Path) -> None:
    path = file_of(tmp_path / "a.ckpt", {"NMC(nmc)": nmc()})
    with pytest.raises(ArgumentError, match="either features and targets, or ids"):
        forget_samples(path, tmp_path / "b.ckpt", **given)


# ---- the command line, with a run of its own


SETTINGS = run_settings(
    "features:train",
    [
        {"class_path": "NMC"},
        {"class_path": "AEFOCL"},
        {"class_path": "StreamEvaluation", "init_args": {"figures": False, "table": False}},
        {"class_path": "StreamProgressBar"},
    ],
    batch_size=16,
    epochs_per_experience=2,  # each sample is in the sums twice
)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a finished run of ``clkit fit``, with the data folder set."""
    folder = tmp_path_factory.mktemp("cli")
    images, targets = digits()
    np.savez(
        folder / "train.npz",
        f_train=images[:300].numpy(),
        y_train=targets[:300].numpy(),
        f_test=images[1500:].numpy(),
        y_test=targets[1500:].numpy(),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLKIT_DATA", str(folder))
        patch.chdir(folder)
        Path("mine.yaml").write_text(yaml.safe_dump(SETTINGS))
        with pytest.warns(UserWarning, match="a second epoch over an experience"):
            assert main(["fit", "--config", "mine.yaml"]) == 0
        yield folder / "runs" / "r" / "v"


@pytest.fixture
def last(fitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The last checkpoint of that run, seen from an empty folder."""
    monkeypatch.chdir(tmp_path)
    return fitted / "checkpoints" / "last.ckpt"


def said(capsys: pytest.CaptureFixture[str], *arguments: Any, status: int) -> str:
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == status
    printed = capsys.readouterr()
    if status:
        assert printed.err.startswith("clkit: ")
        assert printed.err.count("\n") == 1
        return printed.err
    assert printed.err == ""
    return printed.out


def test_forget_by_number_takes_out_every_time_that_a_sample_was_learned(
    last: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, targets = digits()
    gone = torch.tensor([0, 7, 8, 20, 299])
    np.savez("ids.npz", ids=gone.numpy())
    printed = said(capsys, "forget", last, "--samples", "ids.npz", "-o", "less.ckpt", status=0)
    assert printed == (
        "wrote less.ckpt, without 5 samples; what is left:\n"
        "  NMC(nmc): 590 samples of 10 classes\n"
        "  AEFOCL(aef_ocl): 590 samples of 10 classes\n"
    )
    kept = torch.ones(300, dtype=torch.bool)
    kept[gone] = False
    twice = torch.cat([images[:300][kept]] * 2), torch.cat([targets[:300][kept]] * 2)
    assert_equal_heads(load_head("less.ckpt", "nmc"), by_hand("janson", *twice), images[1500:])
    assert_equal_heads(load_head("less.ckpt", "aef_ocl"), by_hand("pfg", *twice), images[1500:])
    before, after = read_checkpoint(last), read_checkpoint("less.ckpt")
    assert before.keys() == after.keys()
    for name in before.keys() - {"callbacks"}:
        assert json.dumps(before[name], default=repr) == json.dumps(after[name], default=repr)


@pytest.mark.parametrize(
    ("arrays", "wanted"),
    [
        ({"ids": [300]}, "there is no sample 300: the training part has the rows 0 to 299"),
        ({"ids": [-1]}, "there is no sample -1"),
        ({"features": np.ones((1, 64)), "targets": [12]}, "NMC(nmc): cannot subtract 1 samples of class 12"),
        ({"features": np.ones((1, 9)), "targets": [1]}, "NMC(nmc): "),
        ({"ids": np.array(["a", None], dtype=object)}, "s.npz: ids is an array of Python objects"),
    ],
)
def test_what_forget_refuses(
    last: Path, capsys: pytest.CaptureFixture[str], arrays: dict[str, Any], wanted: str
) -> None:
    np.savez("s.npz", **arrays)
    assert wanted in said(capsys, "forget", last, "--samples", "s.npz", "-o", "less.ckpt", status=2)
    assert [path.name for path in Path().iterdir()] == ["s.npz"]


def test_forget_what_was_learned_in_the_last_epochs_alone(last: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = yaml.safe_load((last.parents[1] / "config.yaml").read_text())
    settings["trainer"]["callbacks"] = [
        {"class_path": "NMC", "init_args": {"epochs": "last"}},
        {"class_path": "ModelCheckpoint", "init_args": {"save_last": True, "save_top_k": 0}},
    ]
    settings["trainer"] |= {"enable_progress_bar": False, "logger": False, "default_root_dir": "once"}
    Path("once.yaml").write_text(yaml.safe_dump(settings))
    assert main(["fit", "--config", "once.yaml"]) == 0
    (path,) = Path("once").rglob("last.ckpt")
    np.savez("ids.npz", ids=[0, 7, 299])
    printed = said(capsys, "forget", path, "--samples", "ids.npz", "-o", "less.ckpt", "--config", "once.yaml", status=0)
    assert "NMC(nmc): 297 samples of 10 classes" in printed
    images, targets = digits()
    kept = ~torch.isin(torch.arange(300), torch.tensor([0, 7, 299]))
    assert_equal_heads(
        load_head("less.ckpt", "nmc"), by_hand("janson", images[:300][kept], targets[:300][kept]), images[1500:]
    )


def test_forget_in_the_middle_of_a_run(last: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Samples that were not passed yet were not learned, and some were passed once only."""
    settings = yaml.safe_load((last.parents[1] / "config.yaml").read_text())
    settings["trainer"]["callbacks"] = [
        {"class_path": "NMC"},
        {"class_path": "ModelCheckpoint", "init_args": {"every_n_train_steps": 13, "save_top_k": -1}},
    ]
    settings["trainer"] |= {"max_steps": 13, "enable_progress_bar": False, "logger": False, "default_root_dir": "part"}
    Path("part.yaml").write_text(yaml.safe_dump(settings))
    assert main(["fit", "--config", "part.yaml"]) == 0
    (path,) = Path("part").rglob("*.ckpt")
    images, targets = digits()
    data = StreamDataModule("features:train", ClassIncremental(experiences=2), batch_size=16, epochs_per_experience=2)
    data.setup("fit")
    passed = [rows for epoch in (0, 1) for rows in batches_of(data, epoch)][:13]  # ten batches an epoch
    twice, once = set(np.concatenate(passed[:10])) & set(np.concatenate(passed[10:])), np.concatenate(passed[:10])
    gone = [sorted(twice)[0], sorted(set(once) - twice)[0]]
    np.savez("ids.npz", ids=gone)
    said(capsys, "forget", path, "--samples", "ids.npz", "-o", "less.ckpt", "--config", "part.yaml", status=0)
    rows = torch.from_numpy(np.concatenate(passed))
    rows = rows[~torch.isin(rows, torch.tensor(gone))]
    assert_equal_heads(load_head("less.ckpt", "nmc"), by_hand("janson", images[rows], targets[rows]), images[1500:])
    np.savez("ids.npz", ids=[int(torch.nonzero(targets[:300] == 9)[0])])
    error = said(capsys, "forget", path, "--samples", "ids.npz", "-o", "no.ckpt", "--config", "part.yaml", status=2)
    assert "were not learned by NMC(nmc) before this checkpoint was saved" in error


def batches_of(data: StreamDataModule, epoch: int) -> list[Any]:
    """Of the first experience, by the documented order."""
    first = data.training_rows(0)
    order = first[np.random.default_rng((0, epoch)).permutation(len(first))]
    return np.array_split(order, -(-len(order) // 16))


def changed(last: Path, change: Callable[[dict[str, Any]], object]) -> str:
    settings = yaml.safe_load((last.parents[1] / "config.yaml").read_text())
    change(settings)
    Path("changed.yaml").write_text(yaml.safe_dump(settings))
    return "changed.yaml"


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (put("trainer.strategy", "auto"), "trains the network"),
        (put("trainer.limit_train_batches", 3), "limits the training batches"),
        (put("trainer.callbacks", []), "has no callback NMC(nmc), AEFOCL(aef_ocl), but []"),
        (put("data.seed", 3), "comes from another stream: it has seed=0; here it is 3"),
        (put("data.scenario.experiences", 5), "another stream: it has 2 experiences, here are 5; 2 of 2 differ"),
        (put("data.source", "features:elsewhere"), "elsewhere"),
        (
            lambda s: s["model"]["init_args"].update(num_classes=10, model_kwargs={"in_features": 64}),
            "the checkpoint has the weights of another network: Missing key(s) in state_dict",
        ),
    ],
)
def test_settings_that_are_not_those_of_the_run(
    last: Path, capsys: pytest.CaptureFixture[str], change: Any, wanted: str
) -> None:
    np.savez("ids.npz", ids=[1])
    config = changed(last, change)
    error = said(capsys, "forget", last, "--samples", "ids.npz", "-o", "no.ckpt", "--config", config, status=2)
    assert wanted in error
    assert not Path("no.ckpt").exists()


def test_a_checkpoint_away_from_its_run_needs_the_settings(last: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(last, "alone.ckpt")
    np.savez("ids.npz", ids=[1])
    error = said(capsys, "forget", "alone.ckpt", "--samples", "ids.npz", "-o", "no.ckpt", status=2)
    assert "the settings of the run are not there" in error
    assert "--config" in error
    config = last.parents[1] / "config.yaml"
    said(capsys, "forget", "alone.ckpt", "--samples", "ids.npz", "-o", "l.ckpt", "--config", config, status=0)


def test_merge_on_the_command_line(last: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez("half.npz", ids=np.arange(0, 300, 2))
    np.savez("rest.npz", ids=np.arange(1, 300, 2))
    for part in ("half", "rest"):
        said(capsys, "forget", last, "--samples", f"{part}.npz", "-o", f"{part}.ckpt", status=0)
    printed = said(capsys, "merge", "half.ckpt", "rest.ckpt", "-o", "both.ckpt", status=0)
    assert printed == (
        "wrote both.ckpt, merged from 2 checkpoints, for evaluation and export (no fit can go on from it); what is "
        "learned:\n  NMC(nmc): 600 samples of 10 classes\n  AEFOCL(aef_ocl): 600 samples of 10 classes\n"
    )
    images, _ = digits()
    for name in ("nmc", "aef_ocl"):
        assert_equal_heads(load_head("both.ckpt", name), load_head(last, name), images[1500:])
    assert "exists" in said(capsys, "merge", "half.ckpt", "rest.ckpt", "-o", "both.ckpt", status=2)
    said(capsys, "merge", "half.ckpt", "rest.ckpt", "-o", "both.ckpt", "--force", status=0)
    np.savez("ids.npz", ids=[1])
    config = last.parents[1] / "config.yaml"
    error = said(capsys, "forget", "both.ckpt", "--samples", "ids.npz", "-o", "n.ckpt", "--config", config, status=2)
    assert "merged from several runs" in error
    assert main(["validate", "--config", str(config), "--ckpt_path", "both.ckpt"]) == 0
    capsys.readouterr()
    assert main(["fit", "--config", str(config), "--ckpt_path", "both.ckpt"]) != 0
    assert "no fit can go on from this checkpoint" in capsys.readouterr().err


def test_export_on_the_command_line(last: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is not a file" in said(capsys, "export", "no.ckpt", "-o", "m.pt", status=2)
    error = said(capsys, "export", last, "-o", "m.pt", status=2)
    assert "has the heads ['aef_ocl', 'nmc']; one must be named (--head)" in error
    assert "none named 'lda'" in said(capsys, "export", last, "--head", "lda", "-o", "m.pt", status=2)
    assert "must end in .pt" in said(capsys, "export", last, "--head", "nmc", "-o", "m.onnx", status=2)
    assert "divides the features by their length" in said(
        capsys, "export", last, "--head", "nmc", "-o", "m.pt", status=2
    )
    assert not list(Path().iterdir())
    printed = said(capsys, "export", last, "--head", "aef_ocl", "-o", "m.pt", status=0)
    assert "IdentityBackbone with the head 'aef_ocl', 10 classes learned of 10 outputs\n" in printed
    said(capsys, "export", last, "--head", "nmc", "-o", "m.pt2", status=0)
    images, _ = digits()
    saved = torch.load("m.pt", weights_only=True)
    logits = images[1500:] @ saved["state_dict"]["fc.weight"].T + saved["state_dict"]["fc.bias"]
    assert (logits.argmax(1) == load_head(last, "aef_ocl").predict(images[1500:])).float().mean() > 0.99
    program = torch.export.load("m.pt2").module()
    assert (program(images[1500:]).argmax(1) == load_head(last, "nmc").predict(images[1500:])).float().mean() > 0.99
    assert torch.equal(load_head("m.pt", "aef_ocl").classes, torch.arange(10))


@pytest.mark.parametrize("command", ["merge", "forget", "export"])
def test_help_of_each_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert "--force" in capsys.readouterr().out


@pytest.mark.slow
def test_a_convolutional_network_gives_the_very_features_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All samples but one are forgotten: what is left is that one, to the digits of float64 sums."""
    monkeypatch.chdir(tmp_path)
    settings = json.loads(json.dumps(SETTINGS))
    settings["model"]["init_args"] = {"backbone": "test_resnet", "model_kwargs": {"in_chans": 1}}
    settings["data"]["init_args"] |= {"source": "digits", "preprocessing": "unit", "val_fraction": 0.5}
    Path("mine.yaml").write_text(yaml.safe_dump(settings))
    with pytest.warns(UserWarning, match="a second epoch over an experience"):
        assert main(["fit", "--config", "mine.yaml"]) == 0
    path = next(Path("runs").rglob("last.ckpt"))
    data = StreamDataModule("digits", ClassIncremental(experiences=2), val_fraction=0.5)
    data.setup("fit")
    rows = np.concatenate([data.training_rows(0), data.training_rows(1)])
    np.savez("ids.npz", ids=rows[1:])
    said(capsys, "forget", path, "--samples", "ids.npz", "-o", "one.ckpt", status=0)
    np.savez("ids.npz", ids=rows)
    said(capsys, "forget", path, "--samples", "ids.npz", "-o", "none.ckpt", status=0)
    statistics = load_head("one.ckpt", "aef_ocl").statistics
    assert statistics.counts.tolist() == [2]
    assert torch.linalg.matrix_rank(statistics.gram, rtol=1e-12) == 1
    assert torch.allclose(statistics.gram, 2 * statistics.means.T @ statistics.means, rtol=0, atol=1e-9)
    assert load_head("none.ckpt", "aef_ocl").classes.numel() == 0


def test_a_file_with_a_replay_memory_forgets_nothing(tmp_path: Path) -> None:
    path = file_of(tmp_path / "run.ckpt", {"NMC(nmc)": nmc()}, memory={"data": torch.zeros(2, 3)})
    with pytest.raises(ConfigurationError, match="replay memory"):
        forget_samples(path, tmp_path / "less.ckpt", features=torch.ones(1, 4), targets=torch.tensor([0]))
    assert not (tmp_path / "less.ckpt").exists()


def test_a_merged_file_holds_no_state_of_a_strategy(tmp_path: Path) -> None:
    files = [file_of(tmp_path / name, {"NMC(nmc)": nmc()}, memory={}) for name in ("a.ckpt", "b.ckpt")]
    merge_checkpoints(files, tmp_path / "both.ckpt")
    assert STRATEGY not in torch.load(tmp_path / "both.ckpt", weights_only=True)
