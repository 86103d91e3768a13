"""Bounded tables of features and errors: a function of the set of samples, against a naive sort; their weights."""

from __future__ import annotations

import copy
import io
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clkit.errors import ArgumentError, BatchError, StateError
from clkit.methods import ErrorPredictor, ErrorRecords, FeatureMemory, sample_keys
from clkit.testing._compare import changed

NAN, INF = float("nan"), float("inf")
MASK = 2**64 - 1


def splitmix64(value: int) -> int:
    """In whole numbers of Python, which know no overflow."""
    z = (value + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def key(seed: int, sample: int) -> int:
    return splitmix64(splitmix64(seed) ^ sample)


def test_golden_keys() -> None:
    assert splitmix64(0) == 0xE220A8397B1DCDAF
    assert sample_keys(0, torch.tensor([0, 1])).tolist() == [0xA706DD2F4D197E6F, 0x08B4FDA8C892B50E]
    ids = torch.tensor([0, 3, 2**40 + 5, 2**63 - 1])
    for seed in (0, 7, 2**62):
        assert sample_keys(seed, ids).tolist() == [key(seed, each) for each in ids.tolist()]
    for wrong in (ids.float(), ids[None], ids > 0, -ids, ids.tolist()):
        with pytest.raises(BatchError, match="ids"):
            sample_keys(0, wrong)  # type: ignore[arg-type]  # the wrong type is the test
    with pytest.raises(ArgumentError, match="seed"):
        sample_keys(-1, ids)


# ---- the memory


def stream(number: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Features that tell their sample, labels of unequal frequency, and ids."""
    draws = torch.Generator().manual_seed(seed)
    labels = (torch.rand(number, generator=draws) ** 2 * classes).long() * 3
    ids = torch.randperm(10 * number, generator=draws)[:number]
    return torch.stack([ids.float(), labels.float()], dim=1), labels, ids


def expected_rows(labels: Tensor, ids: Tensor, capacity: int, seed: int = 0) -> list[tuple[int, int]]:
    """Label and id of the rows to keep, in the order of their keys, by sorting everything."""
    classes = sorted(set(labels.tolist()))
    of: dict[int, list[int]] = {c: [] for c in classes}
    for label, sample in zip(labels.tolist(), ids.tolist(), strict=True):
        of[label].append(sample)
    for samples in of.values():
        samples.sort(key=lambda sample: key(seed, sample))
    if len(classes) <= capacity:
        kept = [(c, sample) for c in classes for sample in of[c][: capacity // len(classes)]]
    else:
        kept = sorted(((c, of[c][0]) for c in classes), key=lambda row: key(seed, row[1]))[:capacity]
    return sorted(kept, key=lambda row: key(seed, row[1]))


def rows_of(memory: FeatureMemory) -> list[tuple[int, int]]:
    assert torch.equal(memory.features, torch.stack([memory.ids, memory.labels], dim=1).float())
    return list(zip(memory.labels.tolist(), memory.ids.tolist(), strict=True))


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_the_memory_is_a_function_of_the_set_of_samples(data: st.DataObject) -> None:
    number, classes = data.draw(st.integers(1, 80)), data.draw(st.integers(1, 12))
    capacity, seed = data.draw(st.integers(1, 40)), data.draw(st.integers(0, 3))
    features, labels, ids = stream(number, classes, seed)
    order = torch.tensor(data.draw(st.permutations(range(number))))
    parts = [FeatureMemory(capacity, seed) for _ in range(data.draw(st.integers(1, 3)))]
    for batch in order.split(data.draw(st.integers(1, 20))):
        memory = data.draw(st.sampled_from(parts))
        memory.add(features[batch], labels[batch], ids[batch])
        if data.draw(st.booleans()):  # a resume
            state = memory.state_dict()
            parts[parts.index(memory)] = memory = FeatureMemory(capacity, seed)
            memory.load_state_dict(state)
        assert len(memory) <= capacity
    parts = data.draw(st.permutations(parts))
    for other in parts[1:]:
        parts[0].merge(other)
    assert rows_of(parts[0]) == expected_rows(labels, ids, capacity, seed)
    alone = FeatureMemory(capacity, seed)
    alone.add(features, labels, ids)
    assert changed(alone.state_dict(), parts[0].state_dict()) == []


def test_classes_have_equal_shares_and_the_state_is_bounded() -> None:
    memory, sizes = FeatureMemory(100), []
    for start in range(10):
        features, labels, ids = stream(2000, 8, start)
        memory.add(features, labels, ids + 10**6 * start)
        file = io.BytesIO()
        torch.save(memory.state_dict(), file)
        sizes.append(file.tell())
    assert memory.counts == dict.fromkeys(range(0, 24, 3), 12)
    assert max(sizes) - min(sizes) <= 128
    assert max(sizes) < 100 * (2 * 4 + 16) + 4096


def test_names_of_classes_and_what_is_written_to_a_state_change_nothing() -> None:
    features, labels, ids = stream(60, 7)
    names = torch.tensor([5, 900, 3, 77, 1, 0, 8])
    plain, renamed = FeatureMemory(30), FeatureMemory(30)
    plain.add(features, labels, ids)
    renamed.add(features, names[labels // 3], ids)
    assert plain.ids.tolist() == renamed.ids.tolist()
    assert names[plain.labels // 3].tolist() == renamed.labels.tolist()
    before = copy.deepcopy(plain.state_dict())
    for entry in plain.state_dict().values():
        if isinstance(entry, Tensor):
            entry.zero_()
    assert changed(before, plain.state_dict()) == []


def test_a_sample_that_comes_again_replaces_its_row() -> None:
    memory = FeatureMemory(10)
    memory.add(torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64), torch.arange(4))
    memory.add(torch.ones(5, 2), torch.zeros(5, dtype=torch.int64), torch.tensor([2, 3, 3, 2, 9]))
    assert memory.counts == {0: 5}
    assert memory.features[:, 0].tolist() == [float(each in (2, 3, 9)) for each in memory.ids.tolist()]


def test_rows_that_cannot_be_used_are_counted_and_leave_the_rest_alone() -> None:
    features, labels, ids = stream(20, 3)
    good, all_of_them = FeatureMemory(64), FeatureMemory(64)
    usable = torch.ones(20, dtype=torch.bool)
    usable[[3, 4, 11]] = False
    good.add(features[usable], labels[usable], ids[usable])
    features, labels = features.double(), labels.clone()
    features[3, 0], features[4, 1], labels[11] = NAN, 1e39, -1  # beyond float32
    all_of_them.add(features, labels, ids)
    all_of_them.add(features[:0], labels[:0], ids[:0])
    assert (good.rejected, all_of_them.rejected) == (0, 3)
    assert changed(good.state_dict() | {"rejected": 3}, all_of_them.state_dict()) == []
    before = copy.deepcopy(good.state_dict())
    for wrong in (
        (features.long(), labels, ids),
        (features, labels[:-1], ids),
        (features, labels.double(), ids),
        (features, labels, -ids - 1),
        (features, labels - 5, ids),
        (torch.zeros(20, 3), labels, ids),
        (features[0], labels, ids),
    ):
        with pytest.raises(BatchError):
            good.add(*wrong)
    assert changed(before, good.state_dict()) == []
    for other in (FeatureMemory(63), FeatureMemory(64, seed=1), ErrorRecords(64)):
        with pytest.raises(ArgumentError, match="cannot merge"):
            good.merge(other)


def test_half_precision_inference_mode_and_a_meta_trip_leave_plain_float32() -> None:
    features, labels, ids = stream(20, 3)
    memory = FeatureMemory(64)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        memory.add((features % 256).bfloat16(), labels, ids)
    memory.add(features % 256, labels, ids)
    assert memory.features.dtype == torch.float32
    assert not memory.features.is_inference()
    assert memory.to("cpu").device.type == "cpu"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_memory_on_a_gpu_is_that_of_a_cpu() -> None:
    features, labels, ids = stream(200, 5)
    here, there = FeatureMemory(32), FeatureMemory(32, device="cuda")
    features[3, 0] = NAN
    for batch in torch.arange(200).split(17):
        here.add(features[batch], labels[batch], ids[batch])
        there.add(features[batch].cuda(), labels[batch].cuda(), ids[batch])
    assert there.features.device.type == "cuda"
    assert changed(here.state_dict(), there.state_dict()) == []


def test_forgotten_samples_are_gone() -> None:
    features, labels, ids = stream(60, 4)
    memory = FeatureMemory(40)
    memory.add(features, labels, ids)
    kept = memory.ids
    assert memory.forget(torch.cat([kept[::2], torch.tensor([10**9])])) == len(kept[::2])
    assert memory.ids.tolist() == kept[1::2].tolist()
    memory.add(features, labels, ids)  # there is room again
    assert rows_of(memory) == expected_rows(labels, ids, 40)


def test_damaged_memories_are_refused() -> None:
    features, labels, ids = stream(60, 4)
    memory = FeatureMemory(20)
    memory.add(features, labels, ids)
    state = memory.state_dict()
    swapped = {name: each[[1, 0, *range(2, len(each))]] for name, each in state.items() if name in ("ids", "features")}
    odd = [
        {**state, "ids": state["ids"].flip(0)},
        {**state, **swapped},
        {**state, "strata": state["strata"] + 100},
        {**state, "strata": torch.zeros_like(state["strata"])},  # one class has more than its share
        {**state, "seen": state["seen"][:-1]},
        {**state, "features": state["features"].double()},
        {**state, "features": state["features"] * NAN},
        {**state, "features": state["features"][:-1]},
        {**state, "capacity": 21},
        {**state, "seed": 1},
        {**state, "rejected": -1},
        {**state, "more": 1},
    ]
    for each in odd:
        with pytest.raises(StateError):
            memory.load_state_dict(each)
    assert changed(state, memory.state_dict()) == []
    for wrong in ({"capacity": 0}, {"seed": -1}, {"capacity": 2.5}, {"device": "nowhere"}):
        with pytest.raises(ArgumentError):
            FeatureMemory(**wrong)  # type: ignore[arg-type]  # wrong types are the test


# ---- records


def batch(number: int, seed: int = 0, start: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    phi = torch.randn(number, 3, generator=draws, dtype=torch.float64)
    return phi, torch.rand(number, generator=draws, dtype=torch.float64), torch.arange(start, start + number)


def test_sources_share_the_capacity_and_order_does_not_count() -> None:
    phi, error, ids = batch(500)
    tables = []
    for order in (torch.arange(500), torch.arange(500).flip(0)):
        records = ErrorRecords(90)
        for part in order.split(33):
            records.add("prequential", phi[part], error[part], ids[part])
            records.add("novel", phi[part], torch.ones(len(part)), ids[part])
            records.add("calibration", phi[part[:1]], error[part[:1]], ids[part[:1]])
        tables.append(records)
    # the first batches have other calibration rows: compare the two sources that saw the same
    kept = [
        sorted((int(s), int(i)) for s, i in zip(t.state_dict()["strata"], t.state_dict()["ids"], strict=True))
        for t in tables
    ]
    same = [[row for row in rows if row[0] != 4] for rows in kept]
    assert same[0] == same[1]
    smallest = sorted(range(500), key=lambda sample: key(0, sample))[:30]
    assert [sample for source, sample in same[0] if source == 0] == sorted(smallest)
    assert tables[0].counts == {"prequential": 30, "novel": 30, "calibration": 16}
    fitted = tables[0].training_set()
    everything = tables[0].state_dict()
    assert torch.equal(fitted.phi, everything["phi"])
    keys = sample_keys(0, everything["ids"])
    assert (keys[1:] >= keys[:-1]).all()  # of one sample with several sources the first source comes first


def test_features_are_needed_only_of_records_that_would_be_kept() -> None:
    phi, error, ids = batch(300)
    whole, spared = ErrorRecords(40), ErrorRecords(40)
    offered = 0
    for part in torch.arange(300).split(20):
        whole.add("prequential", phi[part], error[part], ids[part])
        wanted = part[spared.admits("prequential", ids[part])]
        offered += len(wanted)
        spared.add("prequential", phi[wanted], error[wanted], ids[wanted])
    assert changed(whole.state_dict(), spared.state_dict()) == []
    assert 40 <= offered < 180


def test_weights_are_those_of_the_stream_and_novelty_has_its_share() -> None:
    records = ErrorRecords(1000)
    phi, error, ids = batch(60)
    labels = torch.arange(60) % 3  # 20 rows a class
    records.add("loo", phi, error, ids, labels)
    records.add("novel", phi, torch.ones(60), ids, labels)
    records.add("prequential", phi[:30], error[:30], ids[:30])
    counts = {0: 1000, 1: 100, 2: 10}
    found = records.training_set(counts, novelty=0.2)
    state = records.state_dict()
    loo, novel, plain = (state["strata"] == source for source in (1, 3, 0))
    raw = torch.tensor([counts[int(label)] / 20 for label in state["label"][loo]], dtype=torch.float64)
    torch.testing.assert_close(found.weight[loo], raw / raw.mean())
    assert found.weight[plain].tolist() == [1.0] * 30
    ordinary = float(found.weight[~novel].sum())
    assert ordinary == pytest.approx(90)
    assert float(found.weight[novel].sum()) == pytest.approx(0.25 * ordinary)
    assert len(found.weight[novel].unique()) == 1
    assert records.training_set().weight[loo].tolist() == [1.0] * 60  # classes are as frequent as they are here
    without = records.training_set({0: 5, 1: 5})  # class 2 was unlearned
    assert (without.weight[loo][state["label"][loo] == 2] == 0).all()


def test_no_novelty_is_as_if_there_were_no_novel_records() -> None:
    phi, error, ids = batch(200)
    one, other = ErrorRecords(1000), ErrorRecords(1000)
    for records in (one, other):
        records.add("prequential", phi, error, ids)
    one.add("novel", phi + 5, torch.ones(200), ids)
    predictors = [ErrorPredictor(), ErrorPredictor()]
    for predictor, records in zip(predictors, (one, other), strict=True):
        predictor.fit(*records.training_set(novelty=0.0, holdout=0.2))
    assert changed(predictors[0].state_dict(), predictors[1].state_dict()) == []
    lifted = ErrorPredictor()
    lifted.fit(*one.training_set(novelty=0.05))
    # the prior of a novelty lifts the mean by about its share
    mean = float(error.mean())
    weights = one.training_set(novelty=0.05)
    assert float(weights.weight @ weights.error / weights.weight.sum()) == pytest.approx(0.95 * mean + 0.05)
    alone = ErrorRecords(10)
    alone.add("novel", phi[:4], torch.ones(4), ids[:4])
    assert alone.training_set().weight.tolist() == [1.0] * 4
    assert len(alone.training_set(novelty=0.0).weight) == 0


def test_what_is_held_out_is_never_fitted() -> None:
    phi, error, ids = batch(1000)
    records = ErrorRecords(2000)
    records.add("prequential", phi, error, ids)
    records.add("novel", phi[:100], torch.ones(100), ids[:100])
    multiples = [key(0, sample) % 5 == 0 for sample in range(1000)]
    fitted, held = records.training_set(novelty=0.0, holdout=0.2), records.held_out()
    assert len(held.error) == sum(multiples)
    assert set(held.error.tolist()) == set(error[torch.tensor(multiples)].tolist())
    assert set(held.error.tolist()) | set(fitted.error.tolist()) == set(error.tolist())
    assert len(fitted.error) == 1000 - len(held.error)
    assert len(records.training_set(holdout=0.2).error) == len(fitted.error) + 100  # novel ones are all fitted
    assert len(records.held_out(holdout=0.0).error) == 0
    for wrong in (0.3, 1.0, -0.1, NAN):
        with pytest.raises(ArgumentError, match="holdout"):
            records.held_out(holdout=wrong)
    for wrong in (1.0, -0.1, NAN):
        with pytest.raises(ArgumentError, match="novelty"):
            records.training_set(novelty=wrong)


def test_records_that_cannot_be_used_are_counted() -> None:
    phi, error, ids = batch(10)
    records, good = ErrorRecords(50), ErrorRecords(50)
    good.add("prequential", phi[4:], error[4:], ids[4:], experience=2, step=7)
    phi[0, 1], error[1], error[2], error[3] = NAN, INF, -0.5, NAN
    records.add("prequential", phi, error, ids, experience=2, step=7)
    assert records.rejected == 4
    assert changed(good.state_dict() | {"rejected": 4}, records.state_dict()) == []
    assert records.state_dict()["step"].tolist() == [7] * 6
    before = copy.deepcopy(records.state_dict())
    wrong: list[tuple[Any, ...]] = [
        ("prequential", phi[:, :2], error, ids),
        ("prequential", phi, error[:, None], ids),
        ("prequential", phi, error, ids[:-1]),
        ("prequential", phi.long(), error, ids),
        ("prequential", phi, error, ids, ids.float()),
    ]
    for arguments in wrong:
        for method in (records.add, records.replace):
            with pytest.raises(BatchError):
                method(*arguments)
    with pytest.raises(ArgumentError, match="source must be one of"):
        records.add("dreams", phi, error, ids)  # type: ignore[arg-type]  # the wrong name is the test
    with pytest.raises(ArgumentError, match="labels are needed"):
        records.add("loo", phi, error, ids)
    assert changed(before, records.state_dict()) == []


def test_records_are_replaced_source_by_source_and_forgotten_by_sample() -> None:
    phi, error, ids = batch(40)
    records = ErrorRecords(200)
    assert records.forget(ids) == 0
    records.replace("loo", phi, error, ids, ids % 4)
    records.add("prequential", phi, error, ids)
    records.replace("loo", phi[:5], error[:5] + 1, ids[:5], ids[:5] % 4)
    assert records.counts == {"prequential": 40, "loo": 5}
    assert records.forget(torch.tensor([0, 1, 99])) == 4
    assert records.counts == {"prequential": 38, "loo": 3}
    assert len(records) == 41


def test_merged_records_are_those_of_one_pass() -> None:
    parts = [batch(150, seed, 1000 * seed) for seed in range(3)]
    whole = ErrorRecords(120, seed=5)
    separate = [ErrorRecords(120, seed=5) for _ in parts]
    for (phi, error, ids), own in zip(parts, separate, strict=True):
        for records in (whole, own):
            records.add("prequential", phi, error, ids)
            records.add("novel", phi[:9], torch.ones(9), ids[:9])
    for order in ((0, 1, 2), (2, 0, 1)):
        merged = ErrorRecords(120, seed=5)
        for part in order:
            merged.merge(separate[part])
        assert changed(whole.state_dict(), merged.state_dict()) == []


def test_states_of_records_go_through_a_file_and_back() -> None:
    records = ErrorRecords(50)
    for empty in (True, False):
        if not empty:
            records.add("prequential", *batch(80))
            records.add("novel", *batch(20, 1))
        file = io.BytesIO()
        torch.save(records.state_dict(), file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
        loaded = ErrorRecords(50)
        loaded.load_state_dict(state)
        assert changed(loaded.state_dict(), records.state_dict()) == []
        for each in (records, loaded):
            each.add("prequential", *batch(80, 3, 500))
        assert changed(loaded.state_dict(), records.state_dict()) == []
    state = records.state_dict()
    for odd in (
        {**state, "error": -state["error"]},
        {**state, "strata": state["strata"] + 5},
        {**state, "seen": torch.tensor([0, 7])},
        {**state, "phi": state["phi"][:, :0].expand(-1, 0)[:3]},
        {**state, "label": state["label"] - 1},
    ):
        with pytest.raises(StateError):
            records.load_state_dict(odd)
    assert changed(state, records.state_dict()) == []


def test_the_global_random_state_is_left_alone() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002  the global one
    records = ErrorRecords(50)
    records.add("prequential", *batch(80))
    records.training_set(holdout=0.5)
    memory = FeatureMemory(10)
    memory.add(*stream(50, 3))
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002  the global one is asked about
