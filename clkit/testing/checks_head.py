"""What every head must do, whatever its mathematics."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from clkit.errors import ClkitError, NotFittedError
from clkit.stream.resume import capture_random_state
from clkit.testing import processes
from clkit.testing._compare import bits, far, leaves, plain, require, same
from clkit.testing.entries import Entry

__all__ = ["CHECKS"]

WIDTH = 6
IDS = (1, 4, 9)


def _sample(rows: int = 50, start: int = 0, ids: tuple[int, ...] = IDS) -> tuple[Tensor, Tensor]:
    """Make features (rows, 6) float64 and ids, a function of ``start``."""
    generator = torch.Generator().manual_seed(start)
    which = torch.randint(len(ids), (rows,), generator=generator)
    features = torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64) + which[:, None].double()
    return features, torch.tensor(ids)[which]


def _taught(entry: Entry, features: Tensor, targets: Tensor, rows: int | None = None) -> Any:
    """Make a head that has learned these samples, in one batch or in batches of some rows."""
    head = entry.make(features.shape[1])
    size = rows or len(features)
    for start in range(0, len(features), size):
        head.update(features[start : start + size], targets[start : start + size])
    return head


def _learned(entry: Entry, rows: int = 50, start: int = 0) -> Any:
    """Make a head that has learned the rows of a sample in batches."""
    return _taught(entry, *_sample(rows, start), rows=25)


def _state_of(head: Any) -> dict[str, Any]:
    return dict(copy.deepcopy(head.state_dict()))


def _all_of(head: Any, features: Tensor) -> list[Any]:
    """Give all that two equal heads share: state and scores."""
    return [_state_of(head), head(features)]


@contextmanager
def _unchanged(head: Any, seen: str, advice: str) -> Iterator[None]:
    """Require that a block changes no bit of the state."""
    before = _state_of(head)
    yield
    same(before, _state_of(head), seen, advice)


def _refused(head: Any, act: Callable[[], Any], what: str, missing_key: bool = False) -> None:
    """Require that an act raises a ClkitError, or where a key is missing what PyTorch raises, and changes nothing."""
    with _unchanged(head, f"{what} was refused and changed the state", "check all of it before the first sum changes"):
        try:
            act()
        except ClkitError:
            return
        except RuntimeError as error:  # load_state_dict of nn.Module raises it before it loads anything
            if not missing_key or "Missing key" not in str(error):
                raise
            return
        require(False, f"{what} was taken", "raise a ClkitError that says what was seen and what is allowed")


def _absent(head: Any, verb: str, *arguments: Any) -> None:
    """Require that a head has no such method, or one that refuses."""
    if hasattr(head, verb):
        _refused(head, partial(getattr(head, verb), *arguments), f"{verb}, which the entry declares absent,")


def _require_close(expected: Any, found: Any, tolerance: float, seen: str, advice: str) -> None:
    """Require that two heads give the same scores, but for rounding."""
    features, _ = _sample()
    require(not far(expected(features), found(features), tolerance), seen, advice)


def scores_have_a_column_for_each_class(entry: Entry) -> None:
    """Scores are (B, C) with column c for class id c, unseen columns -inf, and predict takes the highest."""
    head = _learned(entry)
    features, _ = _sample(20, start=1)
    scores = head(features)
    require(
        scores.shape == (20, max(IDS) + 1),
        f"after the classes {IDS} forward gave shape {tuple(scores.shape)} for 20 rows",
        f"give (20, {max(IDS) + 1}): column = class id",
    )
    seen = torch.tensor(IDS)
    require(
        head.classes.tolist() == list(IDS) and head.classes.dtype == torch.int64,
        f"classes is {head.classes!r}",
        f"give the sorted int64 ids of all classes seen, {list(IDS)}",
    )
    unseen = torch.ones(max(IDS) + 1, dtype=torch.bool).index_fill(0, seen, False)
    require(bool(torch.isneginf(scores[:, unseen]).all()), "columns of unseen classes are not -inf", "fill them so")
    require(bool(scores[:, seen].isfinite().all()), "scores of seen classes are not finite", "check the arithmetic")
    predicted = head.predict(features)
    require(
        predicted.shape == (20,) and predicted.dtype == torch.int64 and torch.equal(predicted, scores.argmax(1)),
        f"predict gave {predicted.dtype} {predicted.tolist()}, the highest columns are {scores.argmax(1).tolist()}",
        "give the (B,) int64 ids of the highest scores",
    )
    answers = _taught(entry, torch.ones(1, WIDTH), torch.tensor([2])).predict(features).tolist()
    require(answers == [2] * 20, f"after one sample of class 2 predict gave {answers}", "the only class seen is 2")


def scores_follow_the_dtype_of_features(entry: Entry) -> None:
    """Features of any floating dtype are upcast; scores come in float64 for float64 features, else in float32."""
    features, targets = _sample()
    head, advice = _learned(entry), "upcast features to float64 before computing or adding them up"
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        low = features.to(dtype)
        scores, expected = head(low), torch.float64 if dtype == torch.float64 else torch.float32
        require(scores.dtype == expected, f"{dtype} features gave {scores.dtype} scores", f"give {expected}")
        otherwise = "otherwise than the same numbers in float64"
        same(head(low.double()).to(expected), scores, f"{dtype} features were scored {otherwise}", advice)
        exact, found = (_state_of(_taught(entry, rows, targets)) for rows in (low.double(), low))
        same(exact, found, f"{dtype} features were learned {otherwise}", advice)


def an_unlearned_head_says_so(entry: Entry) -> None:
    """Before anything is learned forward gives (B, 0) or all -inf, and predict raises NotFittedError."""
    head = entry.make(WIDTH)
    features, _ = _sample(3)
    scores = head(features)
    require(
        scores.ndim == 2 and len(scores) == 3 and bool(torch.isneginf(scores).all()),
        f"forward gave {scores.tolist()}",
        "give (B, 0), or all -inf where columns are preallocated",
    )
    require(not head.classes.numel(), f"classes is {head.classes.tolist()}", "give an empty int64 tensor")
    try:
        answer = head.predict(features)
    except NotFittedError:
        return
    require(False, f"predict answered {answer.tolist()}", "raise clkit.errors.NotFittedError")


def state_survives_a_file(entry: Entry) -> None:
    """The state is tensors and plain values, loads with weights_only=True into a fresh head, and learning goes on."""
    head = _learned(entry)
    state = head.state_dict()
    plain(state, "state_dict()")
    features, targets = _sample(20, start=3, ids=(0, 4, 12))
    for other in (entry.make(WIDTH), _learned(entry, 30, start=9)):
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        other.load_state_dict(torch.load(file, weights_only=True))
        same(_state_of(head), _state_of(other), "a loaded state is not the saved one", "let load_state_dict grow sizes")
        same(head(features), other(features), "a loaded head gives other scores", "save all that predictions need")
        continued = _learned(entry)
        for each in (continued, other):
            each.update(features, targets)
        seen = "a loaded head learned a batch otherwise than one that was never saved"
        same(_all_of(continued, features), _all_of(other, features), seen, "save all that learning needs")


def a_state_that_does_not_fit_is_refused(entry: Entry) -> None:
    """A state of another width, or with a part missing, is refused by name and changes nothing."""
    wide = _taught(entry, torch.ones(2, WIDTH + 1), torch.tensor([0, 1]))
    whole = _learned(entry).state_dict()
    candidates = {"of another width": wide.state_dict()}
    for key in whole:
        candidates[f"without {key!r}"] = {name: value for name, value in whole.items() if name != key}
    for what, state in candidates.items():
        head = _learned(entry, 30, start=9)
        _refused(head, partial(head.load_state_dict, state), f"a state {what}", missing_key=True)


def rows_one_by_one_equal_one_batch(entry: Entry) -> None:
    """How samples are cut into batches does not matter, within the tolerance; a batch of none changes nothing."""
    features, targets = _sample()
    whole, single = _taught(entry, features, targets), _taught(entry, features, targets, rows=1)
    seen = f"rows one by one gave other scores than one batch, by more than {entry.tolerance:g} of the largest"
    advice = "check what depends on the size of a batch, or declare the tolerance of the method"
    _require_close(whole, single, entry.tolerance, seen, advice)
    require(single.predict(features[:1]).shape == (1,), "predict fails for one row", "give (1,)")
    require(single.predict(features[:0]).shape == (0,), "predict fails for no row", "give (0,)")
    with _unchanged(single, "an empty batch changed the state", "return early"):
        single.update(features[:0], targets[:0])


def unlabelled_rows_are_skipped(entry: Entry) -> None:
    """Rows with target -1 are not learned."""
    features, targets = _sample()
    hidden, advice = targets.clone(), "leave them out before adding up"
    hidden[::2] = -1
    head, expected = _taught(entry, features, hidden), _taught(entry, features[1::2], targets[1::2])
    same(_state_of(expected), _state_of(head), "rows with target -1 were learned", advice)
    with _unchanged(head, "a batch of unlabelled rows changed the state", advice):
        head.update(features, torch.full_like(targets, -1))


def hostile_batches_are_refused_whole(entry: Entry) -> None:
    """A malformed batch raises a ClkitError and leaves the state bitwise as it was; so do malformed features."""
    good, ids = _sample(4, start=2)
    spoiled, huge = good.clone(), good.clone()
    spoiled[3, 2], huge[3, 0] = torch.nan, torch.inf
    batches: dict[str, tuple[Any, Any]] = {
        "NaN in the last row": (spoiled, ids),
        "an infinite value in the last row": (huge, ids),
        "features of another width": (torch.ones(4, WIDTH + 1), ids),
        "one-dimensional features": (torch.ones(WIDTH), ids[:1]),
        "integer features": (torch.ones(4, WIDTH, dtype=torch.int64), ids),
        "a negative id": (good, torch.tensor([1, 4, 9, -3])),
        "an id of 2**40": (good, torch.tensor([1, 4, 9, 2**40])),
        "fractional ids": (good, ids.double() + 0.5),
        "too few ids": (good, ids[:3]),
        "ids of two dimensions": (good, ids[:, None]),
    }
    head = _learned(entry)
    for what, batch in batches.items():
        _refused(head, partial(head.update, *batch), f"a batch with {what}")
    for what in ("NaN in the last row", "features of another width", "one-dimensional features"):
        for verb in (head, head.predict):
            _refused(head, partial(verb, batches[what][0]), f"a prediction for {what}")


def merged_heads_equal_the_union(entry: Entry) -> None:
    """Merging equals having learned both parts; a head that cannot merge refuses by name."""
    features, targets = _sample()
    first, second = _taught(entry, features[:20], targets[:20]), _taught(entry, features[20:], targets[20:])
    if not entry.merges:
        _absent(first, "merge", second)
        return
    with _unchanged(second, "merging changed the head that was merged from", "only read it"):
        first.merge(second)
    advice = "add all sums up; centred squares need the difference of the means, too"
    seen = "two merged halves give other scores than their union"
    _require_close(_learned(entry), first, max(entry.tolerance, 1e-9), seen, advice)
    _refused(first, lambda: first.merge(entry.make(WIDTH + 1)), "merging a head of another width")


def subtracting_equals_never_having_seen(entry: Entry) -> None:
    """Subtracting samples gives the head that never learned them; more than was learned is refused."""
    extra = _sample(10, start=5, ids=(4, 30))
    head = _learned(entry)
    if not entry.subtracts:
        _absent(head, "subtract", *extra)
        return
    head.update(*extra)
    head.subtract(*extra)
    require(
        head.classes.tolist() == list(IDS),
        f"after unlearning all of class 30 classes is {head.classes.tolist()}",
        "remove a class with its last sample",
    )
    seen = "after subtract the scores differ from those of a head that never learned the samples"
    advice = "take the same numbers off that update added"
    _require_close(_learned(entry), head, max(entry.tolerance, 1e-8), seen, advice)
    _refused(head, lambda: head.subtract(*extra), "subtracting samples that were not learned")


def reset_forgets_everything(entry: Entry) -> None:
    """After reset the head is as new."""
    head = _learned(entry)
    head.reset()
    same(_state_of(entry.make(WIDTH)), _state_of(head), "reset left something learned", "clear all sums")


def predicting_changes_nothing(entry: Entry) -> None:
    """Predictions, also in inference mode, change no bit of the state or of what is learned later."""
    features, targets = _sample()
    asked, quiet = _learned(entry), _learned(entry)
    with _unchanged(asked, "predicting changed the state", "compute on copies"), torch.inference_mode():
        asked(features)
        asked.predict(features)
    for head in (asked, quiet):
        head.update(features, targets)
    seen = "a head that had predicted learned a batch otherwise"
    advice = "recompute what is cached whenever something was learned"
    same(_all_of(quiet, features), _all_of(asked, features), seen, advice)


def inputs_and_random_state_are_left_alone(entry: Entry) -> None:
    """Features and targets are not modified, no graph is kept, and no global random number is drawn."""
    features, targets = _sample()
    features.requires_grad_(True)
    before, random_before = bits(features), capture_random_state()
    head = _taught(entry, features, targets)
    state = head.state_dict()
    head.predict(features)
    require(bits(features) == before, "update modified the features", "work on a copy")
    require(torch.equal(targets, _sample()[1]), "update modified the targets", "work on a copy")
    kept = [path for path, leaf in leaves(state).items() if isinstance(leaf, Tensor) and leaf.requires_grad]
    require(not kept, f"the state keeps the graph of the features at {kept}", "detach features in update")
    seen = "the global random state of torch, NumPy or Python moved"
    same(random_before, capture_random_state(), seen, "draw from a generator of the head's own, seeded by an argument")


def precision_of_sums_is_kept(entry: Entry) -> None:
    """Autocast, .half() and .bfloat16() change no bit of what is learned."""
    features, targets = _sample()
    features = features.float()
    expected = _all_of(_taught(entry, features, targets), features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = _all_of(_taught(entry, features, targets), features)
    same(expected, found, "learning under autocast gave other bits", "switch autocast off, or compute in float64")
    for what in ("half", "bfloat16"):
        head, uncast = _learned(entry), _learned(entry)
        getattr(head, what)()
        for each in (head, uncast):
            each.update(features, targets)
        seen, advice = f".{what}() on the head changed what is learned", "keep sums neither as buffers nor parameters"
        same(_all_of(uncast, features), _all_of(head, features), seen, advice)


def a_compiled_head_gives_the_same_bits(entry: Entry) -> None:
    """torch.compile (backend "eager", which needs no compiler) gives the same scores, before and after learning on."""
    head = _learned(entry)
    features, targets = _sample(20, start=1)
    torch.compiler.reset()
    compiled: Callable[[Tensor], Tensor] = torch.compile(head, backend="eager")
    for _ in range(2):
        same(head(features), compiled(features), "a compiled head gave other scores", "keep state out of constants")
        head.update(features, targets)
    torch.compiler.reset()


def two_processes_equal_one(entry: Entry) -> None:
    """Two processes that exchange what they learned (synchronize) equal one that learned all."""
    with TemporaryDirectory() as folder:
        reports = processes.run(entry, Path(folder), _learn_in_a_process)
    if not processes.agreed(entry, reports):
        return
    together = entry.make(WIDTH)
    together.load_state_dict(reports[0]["end"])
    seen = "two processes give other scores than one"
    _require_close(_learned(entry), together, max(entry.tolerance, 1e-9), seen, "exchange each share once")


def _learn_in_a_process(entry: Entry, folder: Path, rank: int, world: int) -> dict[str, Any]:
    """Do one process's part of :func:`two_processes_equal_one`: learn its share of the samples, then exchange."""
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    head = entry.make(WIDTH)
    features, targets = _sample()
    try:
        head.update(features[rank::world], targets[rank::world])
        head.synchronize()
    except ClkitError as error:
        return {"refused": str(error)}
    return {"refused": None, "end": _state_of(head)}


CHECKS: list[Callable[[Entry], None]] = [
    scores_have_a_column_for_each_class,
    scores_follow_the_dtype_of_features,
    an_unlearned_head_says_so,
    state_survives_a_file,
    a_state_that_does_not_fit_is_refused,
    rows_one_by_one_equal_one_batch,
    unlabelled_rows_are_skipped,
    hostile_batches_are_refused_whole,
    merged_heads_equal_the_union,
    subtracting_equals_never_having_seen,
    reset_forgets_everything,
    predicting_changes_nothing,
    inputs_and_random_state_are_left_alone,
    precision_of_sums_is_kept,
    a_compiled_head_gives_the_same_bits,
    two_processes_equal_one,
]
