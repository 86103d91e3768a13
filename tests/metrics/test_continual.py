"""The metrics as objects: fed batch by batch, over stages, devices and processes, against dictionaries of counts."""

from __future__ import annotations

import io
import math
import pickle
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import confusion_matrix
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from two_ranks import drive, driven, enter_group

from clkit import metrics as M
from clkit.errors import ArgumentError, BatchError
from clkit.metrics import functional

SCALARS = {
    "average_incremental_accuracy": M.AverageIncrementalAccuracy,
    "final_accuracy": M.FinalAccuracy,
    "average_accuracy": M.AverageAccuracy,
    "forgetting": M.Forgetting,
    "backward_transfer": M.BackwardTransfer,
    "forward_transfer": M.ForwardTransfer,
    "amca": M.AMCA,
}
ALL = [M.AccuracyMatrix, M.AccuracySeen, M.PerClassAccuracy, M.StreamConfusionMatrix, *SCALARS.values()]
HUGE = 2**40  # a class id for which no dense table could be allocated


class Sample(NamedTuple):
    stage: int
    experience: int
    target: int
    prediction: int


Stream = list[Sample]


def batches(stream: Stream, size: int) -> Iterator[Stream]:
    """Batches of one stage, in the order of the stream."""
    for stage in sorted({sample.stage for sample in stream}):
        rows = [sample for sample in stream if sample.stage == stage]
        for start in range(0, len(rows), size):
            yield rows[start : start + size]


def feed(metric: Any, stream: Stream, size: int = 1000) -> Any:
    for batch in batches(stream, size):
        metric.stage = batch[0].stage
        metric.update(*arguments(batch))
    return metric


def arguments(batch: Stream) -> tuple[Tensor, Tensor, Tensor]:
    columns = torch.tensor(batch, dtype=torch.int64).reshape(-1, 4).unbind(1)
    return columns[3], columns[2], columns[1]


def naive_summary(stream: Stream) -> dict[str, Any]:
    """What `results.json` should say, from dictionaries."""
    hits: Counter[tuple[str, int, int]] = Counter()
    total: Counter[tuple[str, int, int]] = Counter()
    for stage, experience, target, prediction in stream:
        if target >= 0:
            for key in (("experience", stage, experience), ("class", stage, target)):
                total[key] += 1
                hits[key] += prediction == target
    stages = max((key[1] for key in total), default=0)
    columns = max((key[2] + 1 for key in total if key[0] == "experience"), default=0)
    columns = columns if columns == 1 else max(columns, stages)  # one for each stage, or one fixed test set
    classes = sorted({key[2] for key in total if key[0] == "class" and key[1] > 0})

    def table(kind: str, counts: Counter[tuple[str, int, int]], keys: list[int]) -> Tensor:
        rows = [[counts[kind, stage, key] for key in keys] for stage in range(1, stages + 1)]
        return torch.tensor(rows, dtype=torch.int64).reshape(stages, len(keys))

    numbers = list(range(columns))
    before = [
        hits["experience", 0, j] / total["experience", 0, j] if total["experience", 0, j] else math.nan for j in numbers
    ]
    return functional.summarize(
        table("experience", hits, numbers),
        table("experience", total, numbers),
        table("class", hits, classes),
        table("class", total, classes),
        before,
    )


def plain(value: Tensor) -> Any:
    """A value as it would stand in the results file."""

    def null(entry: Any) -> Any:
        if isinstance(entry, list):
            return [null(part) for part in entry]
        return None if math.isnan(entry) else entry

    return null(value.tolist())


def same_state(left: Metric, right: Metric) -> bool:
    a, b = left.metric_state, right.metric_state
    return a.keys() == b.keys() and all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)


ids = st.sampled_from([0, 1, 5, HUGE])
samples = st.builds(
    Sample,
    stage=st.integers(0, 3),
    experience=st.integers(0, 3),
    target=st.sampled_from([-1, 0, 1, 5, HUGE]),
    prediction=ids,
)
streams = st.lists(samples, max_size=60)


def class_incremental(seed: int = 0, experiences: int = 4, future: bool = True) -> Stream:
    """Two classes an experience, with ids that have gaps; the whole test set at every stage if `future`."""
    generator = np.random.default_rng(seed)
    stream = []
    for stage in range(experiences + 1):
        for experience in range(experiences if future else stage):
            for target in (3 * experience, HUGE + experience):
                for _ in range(4 + experience):
                    right = generator.random() < (0.9 if experience < stage else 0.2)
                    stream.append(Sample(stage, experience, target, target if right else 1))
    return stream


# --- values -------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(streams, st.integers(1, 20))
def test_values_equal_counting_with_dictionaries(stream: Stream, size: int) -> None:
    expected = naive_summary(stream)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # compute before update
        assert plain(feed(M.AccuracyMatrix(), stream, size).compute()) == expected["accuracy_matrix"]
        assert plain(feed(M.AccuracySeen(), stream, size).compute()) == expected["accuracy_seen"]
        for name, metric in SCALARS.items():
            assert plain(feed(metric(), stream, size).compute()) == expected[name], name


@pytest.mark.parametrize("future", [True, False])
def test_a_class_incremental_stream_defines_every_value(future: bool) -> None:
    stream = class_incremental(future=future)
    expected = naive_summary(stream)
    for name, metric in SCALARS.items():
        defined = future or name != "forward_transfer"
        assert (expected[name] is not None) == defined
        assert plain(feed(metric(), stream, 7).compute()) == expected[name]


def test_classes_not_learned_yet_count_as_zero_in_amca() -> None:
    metric = M.AMCA(num_test_classes=4)
    metric.next_stage()
    metric.update(torch.tensor([1, 1]), torch.tensor([1, 1]), experience=0)
    assert float(metric.compute()) == 0.25
    with pytest.raises(ArgumentError, match="num_test_classes is 0"):
        M.AMCA(num_test_classes=0)
    with pytest.raises(ArgumentError, match="num_test_classes is 1"):
        feed(M.AMCA(num_test_classes=1), class_incremental()).compute()


@settings(deadline=None, max_examples=40)
@given(streams)
def test_class_accuracy_has_a_column_for_each_class_that_occurred(stream: Stream) -> None:
    metric = feed(M.PerClassAccuracy(), stream)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = metric.compute()
    counted = [sample for sample in stream if sample.target >= 0 and sample.stage > 0]
    assert metric.classes == tuple(sorted({sample.target for sample in counted}))
    for t, c in np.ndindex(*table.shape):
        rows = [s for s in counted if s.stage == t + 1 and s.target == metric.classes[c]]
        hits = sum(s.prediction == s.target for s in rows)
        assert plain(table[t, c]) == (hits / len(rows) if rows else None)


@pytest.mark.filterwarnings("ignore:A single label was found")  # scikit-learn, although it is given the labels
@settings(deadline=None, max_examples=40)
@given(streams.filter(lambda stream: any(sample.target >= 0 for sample in stream)))
def test_confusion_matrices_of_all_stages_equal_scikit_learn(stream: Stream) -> None:
    metric = feed(M.StreamConfusionMatrix(), stream, 11)
    counted = [sample for sample in stream if sample.target >= 0]
    labels = sorted({sample.target for sample in counted} | {sample.prediction for sample in counted})
    for stage in range(4):
        metric.stage = stage
        rows = [sample for sample in counted if sample.stage == stage]
        matrix = metric.compute()
        assert metric.classes == tuple(labels)
        assert matrix.dtype == torch.int64
        if rows:
            expected = confusion_matrix([s.target for s in rows], [s.prediction for s in rows], labels=labels)
            assert matrix.tolist() == expected.tolist()
        else:
            assert not matrix.any()


# --- counting -----------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(streams, st.integers(1, 9), st.randoms())
def test_state_depends_on_neither_order_nor_batch_size(stream: Stream, size: int, random: Any) -> None:
    shuffled = list(stream)
    random.shuffle(shuffled)
    for metric in (M.AccuracyMatrix, M.StreamConfusionMatrix):
        one, other = feed(metric(), stream), feed(metric(), shuffled, size)
        one.stage = other.stage = 0
        assert same_state(one, other)


def test_counts_are_exact_integers_that_do_not_grow_with_samples() -> None:
    metric = M.AccuracyMatrix()
    for _ in range(20):
        metric.update(torch.tensor([1, 2, HUGE]), torch.tensor([1, HUGE, HUGE]), experience=0)
    assert metric.counts.dtype == torch.int64
    assert metric.counts.tolist() == [[0, 0, 1, 1, 20], [0, 0, HUGE, -1, 20], [0, 0, HUGE, HUGE, 20]]
    confusion = M.StreamConfusionMatrix()
    for _ in range(20):
        confusion.update(torch.tensor([1, 2, HUGE]), torch.tensor([1, HUGE, HUGE]), experience=0)
    assert confusion.counts.tolist() == [[0, 1, 1, 20], [0, HUGE, 2, 20], [0, HUGE, HUGE, 20]]


def test_stage_chooses_the_row() -> None:
    metric = M.AccuracyMatrix()
    assert metric.stage == 0
    metric.next_stage()
    metric.next_stage()
    assert metric.stage == 2
    metric.update(torch.tensor([0]), torch.tensor([0]), experience=0)
    metric.stage = 1  # an earlier row may be completed later
    metric.update(torch.tensor([1]), torch.tensor([0]), experience=0)
    assert plain(metric.compute()) == [[0.0], [1.0]]
    for value in (-1, 1.0, True, None):
        with pytest.raises(ArgumentError, match="stage is"):
            metric.stage = value
    assert metric.stage == 1


def test_a_value_is_recomputed_after_an_update_and_after_a_new_stage() -> None:
    metric = M.StreamConfusionMatrix()
    metric.update(torch.tensor([0]), torch.tensor([0]), experience=0)
    assert metric.compute().tolist() == [[1]]
    metric.next_stage()
    assert metric.compute().tolist() == [[0]]
    metric.update(torch.tensor([1]), torch.tensor([0]), experience=0)
    assert metric.compute().tolist() == [[0, 1], [0, 0]]


HOSTILE: list[tuple[Any, Any, Any, str]] = [
    (torch.rand(2, 3), torch.tensor([0, 1]), 0, r"predictions has shape \(2, 3\).*argmax"),
    (torch.tensor([0.0, 1.0]), torch.tensor([0, 1]), 0, r"predictions.*float32"),
    (torch.tensor([True, False]), torch.tensor([0, 1]), 0, r"predictions.*bool"),
    ([0, 1], torch.tensor([0, 1]), 0, "predictions is a list"),
    (torch.tensor([0, -1]), torch.tensor([0, 1]), 0, "predictions contains -1: the lowest allowed value is 0"),
    (torch.tensor([0, 1]), torch.tensor([[0, 1]]), 0, r"targets has shape \(1, 2\)"),
    (torch.tensor([0, 1]), torch.tensor([0.0, 1.0]), 0, r"targets.*float32"),
    (torch.tensor([0, 1]), torch.tensor([0, -2]), 0, r"targets contains -2: the lowest allowed value is -1"),
    (torch.tensor([0, 1]), torch.tensor([0]), 0, "predictions has 2 entries, targets 1 and experience 1"),
    (torch.tensor([0, 1]), torch.tensor([0, 1]), torch.tensor([0]), "targets 2 and experience 1"),
    (torch.tensor([0, 1]), torch.tensor([0, 1]), -1, "experience contains -1"),
    (torch.tensor([0, 1]), torch.tensor([0, 1]), torch.tensor([0.5, 0]), r"experience.*float32"),
    (torch.tensor([0, 1]), torch.tensor([0, 1]), 0.5, "experience is 0.5"),
    (torch.tensor([0, 1]), torch.tensor([0, 1]), None, "experience is None"),
]


@pytest.mark.parametrize(("predictions", "targets", "experience", "says"), HOSTILE)
@pytest.mark.parametrize("metric_class", [M.AverageAccuracy, M.StreamConfusionMatrix])
def test_a_refused_batch_changes_nothing(
    metric_class: type[Any], predictions: Any, targets: Any, experience: Any, says: str
) -> None:
    metric, untouched = feed(metric_class(), class_incremental()), feed(metric_class(), class_incremental())
    with pytest.raises(BatchError, match=says):
        metric.update(predictions, targets, experience)
    assert same_state(metric, untouched)
    torch.testing.assert_close(metric.compute(), untouched.compute(), rtol=0, atol=0)


def test_an_empty_batch_changes_nothing() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    metric, untouched = feed(M.Forgetting(), class_incremental()), feed(M.Forgetting(), class_incremental())
    metric.update(none, none, 3)
    metric.update(none, none, none)
    assert same_state(metric, untouched)


@pytest.mark.parametrize("metric_class", ALL)
def test_nothing_evaluated_is_nan_or_empty(metric_class: type[Any]) -> None:
    with pytest.warns(UserWarning, match="before the ``update``"):
        value = metric_class().compute()
    assert value.numel() == 0 or math.isnan(float(value))


# --- torchmetrics' contract -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric_class", ALL)
def test_reset_pickle_clone_and_state_dict(metric_class: type[Any]) -> None:
    stream = class_incremental()
    metric = feed(metric_class(), stream)
    value = metric.compute()

    for twin in (pickle.loads(pickle.dumps(metric)), metric.clone()):
        assert same_state(twin, metric)
        torch.testing.assert_close(twin.compute(), value, rtol=0, atol=0, equal_nan=True)
        twin.update(torch.tensor([0]), torch.tensor([1]), 0)
        assert not same_state(twin, metric)

    assert not metric.state_dict()  # as everywhere in torchmetrics, saving is asked for
    metric.persistent(True)
    file = io.BytesIO()
    torch.save(metric.state_dict(), file)
    file.seek(0)
    fresh = metric_class()
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert fresh.stage == metric.stage
    assert same_state(fresh, metric)
    for continued in (fresh, metric):
        continued.next_stage()
        continued.update(torch.tensor([0, 3]), torch.tensor([0, 0]), 0)
    assert same_state(fresh, metric)

    metric.reset()
    assert metric.stage == 0
    assert same_state(metric, metric_class())
    assert getattr(metric, "classes", ()) == ()
    torch.testing.assert_close(feed(metric, stream).compute(), value, rtol=0, atol=0, equal_nan=True)


def test_inside_a_module_the_state_grows_on_load_and_no_cast_reaches_it() -> None:
    module: Any = nn.Module()
    module.metric = feed(M.AverageAccuracy(), class_incremental())
    module.metric.persistent(True)
    fresh: Any = nn.Module()
    fresh.metric = M.AverageAccuracy()
    fresh.metric.persistent(True)
    fresh.load_state_dict(module.state_dict())
    value = module.metric.compute()
    fresh.metric.update(*arguments([]))
    casts: tuple[Callable[[], Any], ...] = (
        lambda: fresh.half(),
        lambda: fresh.double(),
        lambda: fresh.to(torch.bfloat16),
        lambda: fresh.metric.set_dtype(torch.float16),
    )
    for cast in casts:
        cast()
        assert same_state(fresh.metric, module.metric)
        assert torch.equal(fresh.metric.compute(), value)


def test_batches_seen_in_inference_mode_can_be_followed_by_others() -> None:
    metric = M.AverageAccuracy()
    with torch.inference_mode():
        metric.next_stage()
        metric.update(torch.tensor([0]), torch.tensor([0]), 0)
    metric.update(torch.tensor([1]), torch.tensor([0]), 0)
    metric.persistent(True)
    assert float(pickle.loads(pickle.dumps(metric)).compute()) == 0.5
    metric.reset()
    assert metric.counts.numel() == 0


@pytest.mark.parametrize("metric_class", [M.AccuracyMatrix, M.StreamConfusionMatrix])
def test_forward_counts_and_returns_the_batch_alone_at_its_stage(metric_class: type[Any]) -> None:
    stream = class_incremental(experiences=2)
    metric, expected = metric_class(), metric_class()
    for batch in batches(stream, 5):
        alone = metric_class()
        alone.stage = metric.stage = expected.stage = batch[0].stage
        alone.update(*arguments(batch))
        expected.update(*arguments(batch))
        value = metric(*arguments(batch))
        torch.testing.assert_close(value, alone.compute(), rtol=0, atol=0, equal_nan=True)
        assert same_state(metric, expected)
    metric.reset()
    assert metric.stage == 0


def test_a_collection_shares_one_state_and_gives_the_same_values() -> None:
    stream = class_incremental()
    metrics: Any = {name: metric() for name, metric in SCALARS.items()} | {"c": M.StreamConfusionMatrix()}
    collection = MetricCollection(metrics)
    for batch in batches(stream, 9):
        for metric in collection.values():
            metric.stage = batch[0].stage
        collection.update(*arguments(batch))
    values = collection.compute()
    assert {name: plain(values[name]) for name in SCALARS} == {name: naive_summary(stream)[name] for name in SCALARS}
    assert values["c"].sum() == sum(sample.stage == 4 for sample in stream)
    assert sorted(len(group) for group in collection.compute_groups.values()) == [1, len(SCALARS)]


@settings(deadline=None, max_examples=30)
@given(streams, st.integers(0, 60))
def test_merging_two_metrics_is_counting_everything_in_one(stream: Stream, cut: int) -> None:
    for metric_class in (M.AccuracyMatrix, M.StreamConfusionMatrix):
        first, second = feed(metric_class(), stream[:cut]), feed(metric_class(), stream[cut:])
        whole = feed(metric_class(), stream)
        stages = max(first.stage, second.stage)
        first.merge_state(second)
        assert first.stage == stages
        first.stage = whole.stage
        assert same_state(first, whole)


def test_merging_takes_a_state_and_refuses_another_class() -> None:
    stream = class_incremental()
    metric, other = feed(M.AccuracyMatrix(), stream[:30]), feed(M.AccuracyMatrix(), stream[30:])
    metric.compute()
    metric.merge_state(other.metric_state)
    assert plain(metric.compute()) == naive_summary(stream)["accuracy_matrix"]
    before = metric.counts.clone()
    with pytest.raises(ArgumentError, match="is a StreamConfusionMatrix: only another AccuracyMatrix"):
        metric.merge_state(M.StreamConfusionMatrix())
    with pytest.raises(ArgumentError, match=r"counts of shape \(0, 4\)"):
        metric.merge_state(M.StreamConfusionMatrix().metric_state)
    with pytest.raises(ArgumentError, match="has no current_stage"):
        metric.merge_state({"counts": before})
    assert torch.equal(metric.counts, before)


def test_directions_and_options_are_those_of_torchmetrics() -> None:
    assert M.Forgetting().higher_is_better is False
    assert all(metric().higher_is_better for name, metric in SCALARS.items() if name != "forgetting")
    with pytest.raises(ValueError, match="Unexpected keyword"):
        M.Forgetting(unknown=1)


# --- several processes ----------------------------------------------------------------------------------------------


def shares(case: str) -> tuple[Stream, Stream]:
    """What each of two processes sees."""
    stream = class_incremental()
    if case == "alternating":
        return stream[::2], stream[1::2]
    if case == "other experiences and classes":
        return [s for s in stream if s.experience < 2], [s for s in stream if s.experience >= 2]
    if case == "other stages":
        return [s for s in stream if s.stage in (0, 4)], [s for s in stream if s.stage not in (0, 4)]
    return [], stream  # "nothing on the first"


CASES = ("alternating", "other experiences and classes", "other stages", "nothing on the first")


def work(name: str, folder: Path) -> dict[str, Any]:
    """What one of two processes computes of its share, in each case and by each metric."""
    warnings.simplefilter("ignore")  # the first process computes before any update in one of the cases
    rank = enter_group()
    result: dict[tuple[str, str], Any] = {}
    for case in CASES:
        for metric_class in ALL:
            metric = feed(metric_class(), shares(case)[rank])
            metric.stage = 4
            own = metric.counts.clone()
            value = metric.compute()
            if case == "alternating" and metric_class is M.AccuracyMatrix:
                _, axes = metric.plot()
                result["plot", "AccuracyMatrix"] = len(axes.texts)
            assert torch.equal(metric.counts, own)  # back to its own share after the synchronisation
            metric.sync()
            state = {name: torch.as_tensor(tensor).clone() for name, tensor in metric.metric_state.items()}
            metric.unsync()
            metric.update(torch.tensor([0]), torch.tensor([0]), 0)  # goes on counting: two more in all
            metric.sync()
            again = int(metric.counts[:, -1].sum())
            result[case, metric_class.__name__] = (value, state, again, getattr(metric, "classes", ()))
    return {"result": result}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, str], Any]]:
    return [each["result"] for each in driven(__file__, tmp_path_factory.mktemp("gloo"), ["work"])["work"]]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("metric_class", ALL)
def test_two_processes_equal_one(
    two_processes: list[dict[tuple[str, str], Any]], metric_class: type[Any], case: str
) -> None:
    expected = feed(metric_class(), class_incremental())
    value = expected.compute()
    for rank in range(2):
        got, state, again, classes = two_processes[rank][case, metric_class.__name__]
        torch.testing.assert_close(got, value, rtol=0, atol=0, equal_nan=True)
        assert state.keys() == expected.metric_state.keys()
        assert all(torch.equal(state[name], torch.as_tensor(expected.metric_state[name])) for name in state)
        assert again == int(expected.counts[:, -1].sum()) + 2
        assert classes == getattr(expected, "classes", ())


def test_a_figure_shows_what_all_processes_counted(two_processes: list[dict[tuple[str, str], Any]]) -> None:
    assert [result["plot", "AccuracyMatrix"] for result in two_processes] == [10, 10]  # 4 x 4, lower triangle


# --- devices --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("metric_class", ALL)
def test_on_a_gpu_the_counts_are_the_same(metric_class: type[Any]) -> None:
    stream = class_incremental()
    metric, expected = metric_class().to("cuda"), feed(metric_class(), stream)
    for batch in batches(stream, 9):
        metric.stage = batch[0].stage
        metric.update(*(column.to("cuda") for column in arguments(batch)))
    value = metric.compute()
    assert value.device.type == metric.counts.device.type == "cuda"
    torch.testing.assert_close(value.cpu(), expected.compute(), rtol=0, atol=0, equal_nan=True)
    assert same_state(metric.cpu(), expected)


if __name__ == "__main__":
    sys.exit(drive(work))
